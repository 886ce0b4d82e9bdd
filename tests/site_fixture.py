"A project as the studies leave it, with made-up numbers, for tests of the pages"

import json
import math
import random

import nbformat
import plotly.express as px

MODELS = {
    "popularity": 0.118,
    "popularity-7d": 0.131,
    "itemknn": 0.268,
    "ease": 0.331,
    "ials": 0.318,
    "bprmf": 0.284,
    "lightgcn": 0.301,
    "sasrec": 0.323,
    "sasrec-sampled": 0.311,
}
HOSTILE = '<script>alert("x")</script> & Søn of "Frankenstein" (1931)'


def _value(v, d):
    return {"value": round(v, 6), "low": round(v - d, 6), "high": round(v + d, 6), "n": 943}


def _write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _model(top, protocol, model, v, rng, sampled):
    tag = " (100 sampled)" if sampled else ""
    metrics = {f"ndcg@10{tag}": _value(v, 0.012), f"recall@10{tag}": _value(v * 0.85, 0.011)}
    metrics |= {f"hitrate@10{tag}": _value(min(0.95, v * 2.3), 0.014)}
    metrics[f"novelty@10{tag}"] = _value(9 - 14 * v, 0.02)
    metrics[f"coverage@10{tag}"] = {
        "value": 0.03 + 0.5 * rng.random(),
        "low": None,
        "high": None,
        "n": 943,
    }
    folder = top / "artifacts" / "evaluate" / protocol / model
    info = {"protocol": "100 sampled" if sampled else "full", "part": "test"}
    _write(folder / "metrics.json", {"info": info, "metrics": metrics, "beyond": {}})
    if model in ("bprmf", "lightgcn", "sasrec", "sasrec-sampled"):
        rows = [
            {"epoch": e, "loss": 1 / e, "ndcg@10": v * (1 - math.exp(-e / (3 + 9 * rng.random())))}
            for e in range(1, 31)
        ]
        _write(folder / "curve.json", rows)
    seconds = {"popularity": 0.004, "popularity-7d": 0.006, "itemknn": 0.21, "ease": 0.06}.get(
        model, 30 * v**2 * 10
    )
    _write(
        top / "artifacts" / "_cost" / protocol / f"{model}.json",
        {
            "fit_seconds": seconds,
            "p50_ms": 4 * rng.random(),
            "model_mb": 4.2,
            "peak_mb": 512.0,
        },
    )


def _summary(top):
    user = lambda u: {
        "user_id": u,
        "model": "ease",
        "history": ["Alien (1979)", HOSTILE, "Brazil (1985)"],
        "items": [
            {"title": t, "hit": i == 1, "why": "because of Alien (1979)" if i == 0 else ""}
            for i, t in enumerate(
                [
                    "Blade Runner (1982)",
                    "Aliens (1986)",
                    "Good, The Bad and The Ugly, The (1966)",
                    HOSTILE,
                    "Dr. Strangelove (1963)",
                ]
            )
        ],
    }
    _write(
        top / "artifacts" / "summary" / "summary.json",
        {
            "title": "Which recommender should we use for films?",
            "decision": [
                "Use **ease**: it ranks held-out films best (NDCG@10 0.331 [0.319, 0.343]) and trains in under a second.",
                "**sasrec** is not distinguishable from it (difference −0.008 [−0.018, 0.002]) and needs 30 s on the same two cores.",
            ],
            "tiles": [
                {"label": "NDCG@10, ease", "value": "0.331", "note": "[0.319, 0.343], 943 users"},
                {"label": "against popularity", "value": "2.8×", "note": "the simplest model"},
                {"label": "catalogue shown", "value": "31 %", "note": "of 1,682 films"},
                {"label": "to train", "value": "0.06 s", "note": "two cores"},
            ],
            "main_protocol": "ml100k-time",
            "metric": "ndcg@10",
            "recommendations": [user(u) for u in (196, 186, 22, 244, "Zoë <b>")],
            "next": "Run an interleaving test of ease against popularity.",
        },
    )


def _records(top):
    reports = top / "reports"
    reports.mkdir()
    columns = "protocol,dataset,model,metric,value,low,high,n,seconds,peak_mb,hardware,seed,commit,data_sha256,variant,params_sha256"
    rows = [columns]
    for seed in range(3):
        rows.append(
            f"ml100k-ratio,ml100k,ease,ndcg@10,0.33{seed},0.32,0.34,943,0.06,300,2 cores,{seed},a21d0bd,,,"
        )
        rows.append(
            f"ml1m-loo,ml1m,sasrec,ndcg@10,0.17{seed},0.165,0.18,6040,3000,1200,2 cores,{seed},a21d0bd,,,"
        )
    (reports / "benchmark.csv").write_text("\n".join(rows) + "\n")
    (reports / "speed.csv").write_text(
        "task,ours_s,peer,peer_s,ratio,ours_mb,peer_mb,repeats,hardware,commit\n"
        "sasrec epoch (ml100k),1.9,recbole 1.2.1,117,61.6,900,4500,3,AMD EPYC (2 cores),a21d0bd\n"
        "lightgcn epoch (ml100k),0.3,recbole 1.2.1,0.9,3,400,800,3,AMD EPYC (2 cores),a21d0bd\n"
    )


def _study(top):
    fig = px.scatter(
        x=list(range(1500)), y=list(range(1500)), title=HOSTILE, labels={"x": "rank", "y": "count"}
    )
    spec = {"application/vnd.plotly.v1+json": json.loads(fig.to_json())}
    table = (
        "<div><style scoped>.dataframe{}</style><table border='1' class='dataframe'><thead><tr><th></th>"
        + "".join(f"<th>a long column name {i}</th>" for i in range(9))
        + "</tr></thead><tbody><tr><th>0</th>"
        + "<td>1234.5</td>" * 9
        + "</tr></tbody></table></div>"
    )
    code, md = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    out = nbformat.v4.new_output
    nb = nbformat.v4.new_notebook(
        cells=[
            md(
                "# Train and evaluate\n\n> One model, one data set, one table; every number comes from here.\n\n**Needs** data"
            ),
            code("model = 'ease'  # a parameter"),
            code("# Parameters\nmodel = 'ease'"),
            md(
                "## What is measured\n\nThe gain $g_i = 1/\\log_2(i+1)$ and\n\n$$\\mathrm{nDCG} = \\frac{\\sum_i g_i r_i}{\\sum_{i\\le n} g_i}$$\n\nbut not `$x$`."
            ),
            md("## Result"),
            code(
                "frame",
                outputs=[out("execute_result", data={"text/html": table, "text/plain": "x"})],
            ),
            code("fig", outputs=[out("display_data", data=spec)]),
            code("print('x' * 300)", outputs=[out("stream", name="stdout", text="x" * 300 + "\n")]),
            md(
                "## What this does not show\n\nA | B\n---|---\ntext | 1\n\nSee [EASE](../40_models/12_ease.ipynb)."
            ),
        ]
    )
    nb.metadata["papermill"] = {
        "duration": 12.34,
        "end_time": "2026-11-21T08:00:00.1",
        "parameters": {"model": "ease"},
    }
    nb.metadata["recsys_lab"] = {
        "Parameters": "model = ease, seed = 0",
        "Data (SHA-256)": "ml100k-time 0123456789abcdef",
        "Commit": "a21d0bd",
        "Hardware": "AMD EPYC, 2 cores",
        "Versions": "Python 3.11.7, numpy 2.4.6",
    }
    for study, name in (
        ("evaluate", "ml100k-time-ease"),
        ("evaluate", "ml100k-time-sasrec"),
        ("leaderboard", "ml100k-time"),
    ):
        folder = top / "artifacts" / "_executed" / study
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, folder / f"{name}.ipynb")


def _library(top):
    for chapter, name, title in (
        ("00_core", "00_files", "Files"),
        ("40_models", "12_ease", "EASE"),
    ):
        folder = top / "nbs" / chapter
        folder.mkdir(parents=True)
        nb = nbformat.v4.new_notebook(
            cells=[
                nbformat.v4.new_markdown_cell(
                    f"# {title}\n\n> The point of `{name}`.\n\n**Needs** nothing"
                ),
                nbformat.v4.new_code_cell("#| default_exp x"),
                nbformat.v4.new_code_cell("#| hide\nsecret = 1"),
                nbformat.v4.new_code_cell("#| export\ndef f(x):\n    return x"),
            ]
        )
        nbformat.write(nb, folder / f"{name}.ipynb")


def make_project(top):
    "Fill an empty folder"
    rng = random.Random(0)
    (top / "params.yaml").write_text("")
    for protocol, scale in (("ml100k-time", 1.0), ("ml100k-ratio", 1.0), ("ml1m-ncf", 1.4)):
        for model, v in MODELS.items():
            _model(top, protocol, model, v * scale, rng, protocol == "ml1m-ncf")
    _summary(top)
    _records(top)
    _study(top)
    _library(top)
    return top
