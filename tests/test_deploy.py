"What is written in deploy/ agrees with the server: imports and pins, settings, probes, numbers and their labels"

import importlib.metadata as metadata
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

from recsys_lab.serving import numbers
from recsys_lab.serving.app import make_app
from recsys_lab.serving.doors import ServerSettings
from recsys_lab.serving.events import KINDS

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
YAML, JSON = sorted(DEPLOY.rglob("*.yaml")), sorted(DEPLOY.rglob("*.json"))
TEXTS = [p for p in sorted(DEPLOY.rglob("*")) if p.is_file()]
PREFIX = "recsys_lab_"
ITS_OWN = {"job", "instance", "le"}  # Labels that Prometheus adds
CONTAINER = (DEPLOY / "Containerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
# A process to which nothing is installed but the image's packages makes a bundle and answers from it
THIN = """
import asyncio, json, sys, tempfile
from importlib.abc import MetaPathFinder
from pathlib import Path
refused = set(json.loads(sys.argv[1]))

class NotThere(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"not in the image: {name}", name=name)

sys.meta_path.insert(0, NotThere())
import recsys_lab.cli.app, recsys_lab.cli.serving
import faiss, httptools, onnxruntime, redis, uvicorn, uvicorn.protocols.http.httptools_impl, uvloop
import recsys_lab.ranking.index, recsys_lab.serving.network
from recsys_lab.serving.app import make_app
from recsys_lab.serving.doors import ServerSettings
from recsys_lab.serving.load import made_up_bundle
from recsys_lab.serving.people import Ask
from recsys_lab.serving.registry import Registry

folder = Path(tempfile.mkdtemp())
registry = Registry(folder / "registry")
registry.promote(registry.add(made_up_bundle(folder / "bundle")))
told = dict(place=str(registry.folder), events=str(folder / "events.db"), open=True)
desk = make_app(ServerSettings(timeout=20, **told)).state.desk
answer = json.loads(asyncio.run(desk.answer(Ask(user=3)))[0])
desk.close()
assert answer["source"] == "model" and len(answer["items"]) == 10, answer
found = {n.partition(".")[0] for n, m in sys.modules.items() if getattr(m, "__file__", None)}
print(json.dumps(sorted(found - set(sys.stdlib_module_names))))
"""


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def manifests() -> list[dict]:
    files = [p for p in YAML if p.parent.name == "kubernetes"]
    return [d for p in files for d in yaml.safe_load_all(p.read_text())]


def only(kind: str) -> dict:
    (found,) = [m for m in manifests() if m["kind"] == kind]
    return found


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    needs = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonical(n.name): str(n.specifier).removeprefix("==") for n in needs}


@cache
def served() -> tuple:
    "Routes of the application, and where each is"
    import tempfile

    folder = Path(tempfile.mkdtemp())
    app = make_app(ServerSettings(place=str(folder), events=str(folder / "e.db"), open=True))
    paths = set(app.openapi()["paths"])
    app.state.desk.close()
    return tuple(sorted(paths))


@pytest.mark.parametrize("file", YAML + JSON, ids=short)
def test_parses(file):
    if file in JSON:
        assert json.loads(file.read_text())
    else:
        assert all(yaml.safe_load_all(file.read_text()))


def test_kustomization_lists_every_manifest():
    "Nothing is forgotten, nothing is invented"
    (top,) = [m for m in manifests() if m["kind"] == "Kustomization"]
    files = {p.name for p in YAML if p.parent.name == "kubernetes"} - {"kustomization.yaml"}
    assert set(top["resources"]) == files


# Pins and imports


def test_pins_are_those_of_the_workbench():
    all_, ours = pins("constraints.txt"), pins("deploy/requirements-serve.txt")
    assert {k: all_.get(k) for k in ours} == ours


def closure(names) -> set[str]:
    "Distributions that these need, however deep"
    todo, seen = [Requirement(n) for n in names], set()
    while todo:
        need = todo.pop()
        name = canonical(need.name)
        if name in seen:
            continue
        seen.add(name)
        for text in metadata.requires(need.name) or []:
            more = Requirement(text)
            if more.marker is None or more.marker.evaluate({"extra": ""}):
                todo.append(more)
    return seen


def test_everything_that_the_server_imports_is_in_the_image():
    "It answers where every other package is refused; packages that another may do without are not asked for"
    owners = metadata.packages_distributions()
    installed = closure(pins("deploy/requirements-serve.txt")) | {"recsys-lab"}
    absent = [m for m, d in owners.items() if not {canonical(n) for n in d} & installed]
    assert {"torch", "pandas", "IPython"} <= set(absent)
    absent = [m for m in absent if m not in ("_distutils_hack", "setuptools", "pkg_resources")]
    ran = subprocess.run(
        [sys.executable, "-c", THIN, json.dumps(absent)], capture_output=True, text=True
    )
    assert ran.returncode == 0, f"add to deploy/requirements-serve.txt?\n{ran.stderr[-3000:]}"
    modules = set(json.loads(ran.stdout.splitlines()[-1])) & set(owners)
    assert {"fastapi", "polars", "faiss", "onnxruntime", "typer"} <= modules
    direct = {m for m in modules if {canonical(n) for n in owners[m]} & installed}
    assert modules - direct <= {"_distutils_hack"}


def test_the_image_has_no_workbench():
    heavy = {"torch", "pandas", "scipy", "numba", "plotly", "jupyterlab", "nbdev", "scikit-learn"}
    assert not heavy & closure(pins("deploy/requirements-serve.txt"))


# Settings and probes


@pytest.mark.parametrize("file", TEXTS, ids=short)
def test_settings_exist(file):
    named = set(re.findall(r"RECSYS_LAB_SERVE_([A-Z_]+)", file.read_text()))
    unknown = named - {f.upper() for f in ServerSettings.model_fields}
    assert not unknown, f"no setting of a server: {unknown}"


def test_probes_ask_routes_that_there_are():
    (pod,) = only("StatefulSet")["spec"]["template"]["spec"]["containers"]
    ports = {p["name"]: p["containerPort"] for p in pod["ports"]}
    env = {e["name"]: e.get("value") for e in pod["env"]}
    assert ports == {"http": int(env["RECSYS_LAB_SERVE_PORT"])}
    paths = {k: pod[f"{k}Probe"]["httpGet"]["path"] for k in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}
    assert set(paths.values()) <= set(served())
    assert all(pod[f"{k}Probe"]["httpGet"]["port"] in ports for k in paths)
    assert "+ '/healthz'" in CONTAINER
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] in served()


def test_ports_agree():
    (port,) = re.findall(r"RECSYS_LAB_SERVE_PORT=(\d+)", CONTAINER)
    assert int(port) == ServerSettings.model_fields["port"].default
    assert f"EXPOSE {port}" in CONTAINER
    assert COMPOSE["services"]["server"]["ports"][0].endswith(f":{port}")
    assert f"server:{port}" in (DEPLOY / "prometheus/prometheus.yaml").read_text()
    rules = only("NetworkPolicy")["spec"]["ingress"]
    assert [p["port"] for r in rules for p in r["ports"]] == [int(port)]
    for service in (m for m in manifests() if m["kind"] == "Service"):
        assert [p["targetPort"] for p in service["spec"]["ports"]] == ["http"]


def test_selectors_meet_the_pods():
    labels = only("StatefulSet")["spec"]["template"]["metadata"]["labels"]
    chosen = [m["spec"]["selector"] for m in manifests() if m["kind"] == "Service"]
    chosen += [only("PodDisruptionBudget")["spec"]["selector"]["matchLabels"]]
    chosen += [only("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]]
    assert all(c.items() <= labels.items() for c in chosen)
    scaled = only("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("StatefulSet", "recsys-lab")


# Closed by default


def images() -> list[str]:
    named = re.findall(r"^FROM (\S+)", CONTAINER, re.M)
    named += [s["image"] for s in COMPOSE["services"].values()]
    top = only("Kustomization")
    return named + [f"{i['newName']}:{i['newTag']}" for i in top["images"]]


@pytest.mark.parametrize("image", images())
def test_images_have_a_version(image):
    assert re.search(r":[\w.-]*\d", image.rpartition("/")[2]) and "latest" not in image


def test_nobody_is_root():
    (user,) = re.findall(r"^USER (\d+):\d+$", CONTAINER, re.M)
    assert int(user) > 0
    for name, service in COMPOSE["services"].items():
        assert int(service["user"].partition(":")[0]) > 0, name
        assert service["cap_drop"] == ["ALL"], name
        # Compose refuses a read-only root together with a secret that comes from the environment
        assert bool(service.get("read_only")) != bool(service.get("secrets")), name
    spec = only("StatefulSet")["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] == int(user)
    (pod,) = spec["containers"]
    inside = pod["securityContext"]
    assert inside["readOnlyRootFilesystem"] and not inside["allowPrivilegeEscalation"]
    assert not spec["automountServiceAccountToken"]


def test_keys_come_from_outside():
    "No key is written down, and without one nothing starts"
    assert "RECSYS_LAB_SERVE_KEYS:?" in CONTAINER
    assert not re.search(r"RECSYS_LAB_SERVE_KEYS=", CONTAINER)
    keys = COMPOSE["services"]["server"]["environment"]["RECSYS_LAB_SERVE_KEYS"]
    assert re.fullmatch(r"\$\{\w+:\?[^}]+\},\$\{\w+:\?[^}]+\}=prometheus", keys)
    assert "Secret" not in {m["kind"] for m in manifests()}
    (pod,) = only("StatefulSet")["spec"]["template"]["spec"]["containers"]
    (key,) = [e for e in pod["env"] if e["name"] == "RECSYS_LAB_SERVE_KEYS"]
    assert set(key) == {"name", "valueFrom"} and not key["valueFrom"]["secretKeyRef"].get(
        "optional"
    )
    assert not any("RECSYS_LAB_SERVE_OPEN" in p.read_text() for p in TEXTS)
    for service in COMPOSE["services"].values():
        assert all(p.startswith("127.0.0.1:") for p in service.get("ports", []))


def test_one_log_one_machine():
    "Pods have a log each, so they share no Redis; in one container the processes share both"
    spec = only("StatefulSet")["spec"]
    (events,) = spec["volumeClaimTemplates"]
    assert events["spec"]["accessModes"] == ["ReadWriteOnce"]
    (pod,) = spec["template"]["spec"]["containers"]
    assert "RECSYS_LAB_SERVE_REDIS" not in {e["name"] for e in pod["env"]}
    (path,) = re.findall(r"RECSYS_LAB_SERVE_EVENTS=(\S+)", CONTAINER)
    mounts = {m["name"]: m for m in pod["volumeMounts"]}
    assert Path(path).parent == Path(mounts["events"]["mountPath"])
    assert mounts["registry"]["readOnly"]


# Numbers


def queries() -> list[tuple[str, str]]:
    "Every expression and where it stands"
    found = []
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"]:
        found += [(r["alert"], r["expr"]) for r in group["rules"]]
    board = json.loads((DEPLOY / "grafana/recsys_lab.json").read_text())
    found += [(p["title"], t["expr"]) for p in board["panels"] for t in p["targets"]]
    return found


def series() -> dict[str, set]:
    "Series that the server writes -> their labels"
    out = {f"{PREFIX}ready": set()}
    for name, (_, labels) in numbers.COUNTERS.items():
        out[f"{PREFIX}{name}_total"] = set(labels)
    for name, (_, labels, _) in numbers.HISTOGRAMS.items():
        for end in ("bucket", "sum", "count"):
            out[f"{PREFIX}{name}_{end}"] = set(labels)
    return out


VALUES = {
    "route": lambda v: v in (*served(), "other"),
    "kind": lambda v: v in KINDS,
    "found": lambda v: v in ("true", "false"),
    "new": lambda v: v in ("true", "false"),
    "status": lambda v: re.fullmatch(r"[\d.|\[\]]+", v),
    "degraded": lambda v: v == "",
}


@pytest.mark.parametrize(("where", "query"), queries(), ids=lambda v: v[:40])
def test_numbers_exist(where, query):
    known, named = series(), re.findall(rf"\b({PREFIX}\w+)(?:\{{([^}}]*)\}})?", query)
    assert named or query.startswith("up{"), f"{where} asks for nothing of the server"
    for name, inside in named:
        assert name in known, f"{where}: the server has no {name}"
        for label, value in re.findall(r'(\w+)\s*[!=]=?~?\s*"([^"]*)"', inside):
            assert label in known[name] | ITS_OWN, f"{where}: {name} has no label {label}"
            if label not in ITS_OWN:
                assert VALUES[label](value), f"{where}: {label} is never {value!r}"
    labels = set().union(*(known[n] for n, _ in named)) | ITS_OWN
    for group in re.findall(r"\b(?:by|ignoring|on) \(([^)]*)\)", query):
        grouped = {g.strip() for g in group.split(",")}
        assert grouped <= labels, f"{where}: no label {grouped - labels}"


def test_everything_that_matters_is_watched():
    text = "\n".join(q for _, q in queries())
    unseen = [
        n for n in (*numbers.COUNTERS, *numbers.HISTOGRAMS, "ready") if PREFIX + n not in text
    ]
    assert not unseen, f"nobody looks at {unseen}"
    job = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())["scrape_configs"][0]
    assert f'job="{job["job_name"]}"' in text


# README


def test_the_commands_of_the_readme_exist():
    import typer

    from recsys_lab.cli.app import app

    text = (DEPLOY / "README.md").read_text()
    group = typer.main.get_command(app)
    said = re.findall(
        r"(?<!-n )(?<!namespace )recsys-lab ((?:registry )?[a-z]+)", text + CONTAINER + str(COMPOSE)
    )
    assert {"registry promote", "registry rollback", "key", "serve"} <= set(said)
    for words in map(str.split, said):
        command = group
        for word in words:
            assert word in command.commands, f"no command {' '.join(words)}"
            command = command.commands[word]


def test_the_files_of_the_readme_exist():
    text = (DEPLOY / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (DEPLOY / link).exists(), link
    for name in re.findall(r"deploy/[\w./-]+", text):
        assert (ROOT / name).exists(), name
    listed = set(re.findall(r"^\| `([^`]+)`", text, re.M))
    assert all((DEPLOY / n).exists() for n in listed)
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", CONTAINER, re.M)
    let_in = re.findall(r"^!(\S+)$", (DEPLOY / "Containerfile.dockerignore").read_text(), re.M)
    assert set(" ".join(copied).split()) == set(let_in)
    assert all((ROOT / n).exists() for n in let_in)
