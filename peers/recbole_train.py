"""Train and judge one RecBole model with RecBole's own trainer, with a clock beside it."""

import platform
import resource
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import numpy as np
import recbole
import torch
import yaml
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import ModelType, get_model, get_trainer, init_seed
from recbole_files import NAME, write_labels, write_pairs, write_sequences, write_tables
from scipy.sparse import csr_matrix

METRICS = ["NDCG", "Recall", "Hit", "Precision", "MRR", "MAP"]
CUTS = [5, 10, 20]
PACKAGES = ("recbole", "torch", "numpy", "scipy", "pandas")
TRAINING = (
    "epochs",
    "train_batch_size",
    "learner",
    "learning_rate",
    "weight_decay",
    "train_neg_sample_args",
    "eval_step",
    "stopping_step",
    "valid_metric",
    "metrics",
    "topk",
    "eval_batch_size",
)


SHARES = {"RS": [0.8, 0.1, 0.1]}  # RecBole asks for them; not used: the files are split
LABELS = {  # Rows say yes or no by themselves
    "metrics": ["AUC", "LogLoss"],
    "valid_metric": "AUC",
    "load_col": None,
    "LABEL_FIELD": "label",
    "train_neg_sample_args": None,
    "eval_args": {
        "split": SHARES,
        "group_by": "none",
        "order": "RO",
        "mode": "labeled",
    },
}
TABLES = {  # A model of features that is trained and judged as a ranker
    "load_col": None,
    "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1},
    "eval_args": {
        "split": SHARES,
        "group_by": "user",
        "order": "RO",
        "mode": "full",
    },
}


def peak_mb():
    """Largest resident memory of this process so far, in MB of 2**20 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def versions():
    """What ran."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def is_sequential(model):
    """Whether RecBole feeds this model item lists."""
    return get_model(model).type == ModelType.SEQUENTIAL


def make_config(args, work):
    """RecBole's defaults for the model, our files, our cuts, then the overrides of the caller."""
    ours = {
        "data_path": str(work),
        "checkpoint_dir": str(work / "saved"),
        "gpu_id": "",
        "state": "WARNING",
        "show_progress": False,
        "benchmark_filename": ["train", "valid", "test"],
        "seed": args.seed,
        "metrics": METRICS,
        "topk": CUTS,
        "valid_metric": "NDCG@10",
        "metric_decimal_place": 12,
    }
    if args.epochs is not None:
        ours["epochs"] = args.epochs
    if args.labels:
        ours |= LABELS
    if args.tables:
        ours |= TABLES
    if is_sequential(args.model):
        ours["alias_of_item_id"] = ["item_id_list"]
        ours["load_col"] = {"inter": ["user_id", "item_id_list", "item_id"]}
        if args.config.get("loss_type", "CE") == "CE":
            ours["train_neg_sample_args"] = None
    config = Config(model=args.model, dataset=NAME, config_dict=ours | args.config)
    if unknown := sorted(set(args.config) - set(config.internal_config_dict)):
        raise ValueError(f"--config: RecBole has no setting {unknown[0]!r} for {args.model}")
    return config


def write_files(args, split, config, work):
    """Put the split where the configuration points."""
    folder = work / NAME
    folder.mkdir()
    if is_sequential(args.model):
        write_sequences(split, folder, config["MAX_ITEM_LIST_LENGTH"], args.test_history)
    elif args.labels:
        write_labels(split, args.split, folder)
    else:
        write_pairs(split, folder)
        if args.tables:
            write_tables(args.split, folder)


class Codes:
    """RecBole's numbers for users and items (0 is padding) against ours."""

    def __init__(self, dataset):
        self.users = np.array([-1, *map(int, dataset.field2id_token["user_id"][1:])])
        self.items = np.array([-1, *map(int, dataset.field2id_token["item_id"][1:])])
        self.item_number = np.zeros(self.items.max() + 1, dtype=np.int64)
        self.item_number[self.items[1:]] = np.arange(1, len(self.items))

    def matrix(self, rows):
        """Rows of a split as a binary matrix: our user codes by RecBole's item numbers."""
        where = rows["user"], self.item_number[rows["item"]]
        shape = self.users.max() + 1, len(self.items)
        return csr_matrix((np.ones(len(rows)), where), shape=shape) > 0


@torch.no_grad()
def rank(trainer, data, codes, seen=None, k=20):
    """(users, k + 1) array: our user code, then the items RecBole scores highest, -1 where none is left."""
    trainer.model.eval()
    lists = []
    for batch in data:
        rows, scores, *_ = trainer._full_sort_batch_eval(batch)
        users = codes.users[rows["user_id"].numpy()]
        if seen is not None:
            scores[torch.from_numpy(seen[users].toarray())] = -torch.inf
        best, at = torch.topk(scores, k)
        items = np.where(best.isinf(), -1, codes.items[at])
        lists.append(np.column_stack([users, items]))
    lists = np.concatenate(lists).astype(np.int32)
    return lists[np.unique(lists[:, 0], return_index=True)[1]]


def mean_ndcg(lists, codes, truth, k=10):
    """Mean binary NDCG@k of ranked lists, the ideal cut at k."""
    users, items = lists[:, :1], codes.item_number[lists[:, 1 : k + 1]]
    gain = 1 / np.log2(np.arange(2, k + 2))
    hits = truth[users, items].toarray()
    n_truth = np.minimum(truth[lists[:, 0]].sum(axis=1).A1, k)
    return float(np.mean(hits @ gain / np.cumsum(gain)[n_truth - 1]))


@torch.no_grad()
def predicted(trainer, data, codes):
    """(n, 3) array: our user code, our item code, the probability of a yes."""
    trainer.model.eval()
    rows = []
    for batch in data:
        pairs = batch[0] if isinstance(batch, tuple) else batch
        p = trainer.model.predict(pairs).double().numpy()
        users, items = (pairs[name].numpy() for name in ("user_id", "item_id"))
        rows.append(np.column_stack([codes.users[users], codes.items[items], p]))
    return np.concatenate(rows)


def timed(trainer_class, measure):
    """RecBole's trainer, unchanged but for a record of each epoch in `curve`."""

    class Timed(trainer_class):
        curve, judge = (), None

        def _train_epoch(self, train_data, epoch_idx, **options):
            start = perf_counter()
            loss = super()._train_epoch(train_data, epoch_idx, **options)
            row = {"epoch": epoch_idx + 1, "train_s": perf_counter() - start, "loss": loss}
            self.curve = [*self.curve, row]
            return loss

        def _valid_epoch(self, valid_data, **options):
            start = perf_counter()
            score, result = super()._valid_epoch(valid_data, **options)
            row = self.curve[-1]
            row |= {"valid_s": perf_counter() - start, measure: float(result[measure])}
            row["cumulative_train_s"] = sum(r["train_s"] for r in self.curve)
            if self.judge:
                row["ndcg@10_masked"] = self.judge(valid_data)
            return score, result

    return Timed


def masked_judge(trainer, codes, split):
    """Validation NDCG@10 with training items out of the ranking, which RecBole's sequence models leave in."""
    seen, truth = codes.matrix(split["train"]), codes.matrix(split["valid"])
    return lambda data: mean_ndcg(rank(trainer, data, codes, seen), codes, truth)


def clock(call, *args, **options):
    """Result of a call and its seconds."""
    start = perf_counter()
    result = call(*args, **options)
    return result, perf_counter() - start


def train_and_judge(args, split, work):
    """One run: the report (a dict for run.json) and the ranked lists to export (name -> array)."""
    config = make_config(args, work)
    init_seed(config["seed"], config["reproducibility"])
    write_files(args, split, config, work)
    dataset, load_s = clock(create_dataset, config)
    loaders, prepare_s = clock(data_preparation, config, dataset)
    init_seed(config["seed"], config["reproducibility"])
    start_mb = peak_mb()
    model, build_s = clock(get_model(args.model), config, loaders[0]._dataset)
    measure = "auc" if args.labels else "ndcg@10"
    trainer = timed(get_trainer(config["MODEL_TYPE"], config["model"]), measure)(config, model)
    codes = Codes(dataset)
    if is_sequential(args.model):
        trainer.judge = masked_judge(trainer, codes, split)
    trainer.fit(loaders[0], loaders[1], show_progress=False)
    report = {
        "load_s": load_s,
        "prepare_s": prepare_s,
        "build_s": build_s,
        "start_mb": start_mb,
        "train_peak_mb": peak_mb(),
        **describe(args, split, config, dataset, loaders),
    }
    report |= learned(trainer, measure) | judged(trainer, loaders[2], args)
    if args.labels:
        return report, {"pairs": predicted(trainer, loaders[2], codes)}
    return report, export(trainer, loaders[2], codes, split)


def describe(args, split, config, dataset, loaders):
    """What was run, on what, with which settings."""
    names = dict.fromkeys([*TRAINING, *own_settings(args.model), *args.config])
    return {
        "model": args.model,
        "seed": config["seed"],
        "threads": torch.get_num_threads(),
        "n_users": dataset.user_num - 1,
        "n_items": dataset.item_num - 1,
        "rows": {part: len(rows) for part, rows in split.items()},
        "repeated_train_rows": int(split["train"].duplicated(["user", "item"]).sum()),
        "train_targets": len(loaders[0]._dataset),
        "updates_per_epoch": len(loaders[0]),
        "test_history": args.test_history if is_sequential(args.model) else "train",
        "settings": {name: config[name] for name in names} | window(config),
        "versions": versions(),
    }


def window(config):
    """Length of the item lists, for the models that read them."""
    return {
        name: config[name] for name in ["MAX_ITEM_LIST_LENGTH"] if is_sequential(config["model"])
    }


def own_settings(model):
    """Names of the settings that belong to the model itself."""
    file = Path(recbole.__file__).parent / "properties" / "model" / f"{model}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def learned(trainer, measure):
    """The curve of training and its best epoch."""
    scores = [row[measure] for row in trainer.curve]
    best = int(np.argmax(scores))
    return {
        "epochs": trainer.curve,
        "best_epoch": best + 1,
        f"best_valid_{measure}": scores[best],
        "train_s_to_best": trainer.curve[best]["cumulative_train_s"],
    }


def judged(trainer, test_data, args):
    """Test metrics as RecBole reports them at its best epoch, and the seconds of judging again."""
    metrics = trainer.evaluate(test_data)
    again = [
        clock(trainer.evaluate, test_data, load_best_model=False)[1] for _ in range(args.repeats)
    ]
    return {
        "test": {name: float(value) for name, value in metrics.items()},
        "evaluate_s": again,
        "peak_mb": peak_mb(),
    }


def export(trainer, test_data, codes, split):
    """Lists without anything seen in training or validation, and the ranking that RecBole itself judged."""
    seen = codes.matrix(split["train"]) + codes.matrix(split["valid"])
    return {
        "top": rank(trainer, test_data, codes, seen),
        "top_judged": rank(trainer, test_data, codes),
    }
