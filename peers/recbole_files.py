"""A split of ours, written as the pre-split files that RecBole reads.

RecBole calls them benchmark files: with them it neither filters nor splits nor sorts, so it trains on
exactly our training rows and is judged on exactly our targets.
"""

import numpy as np
import pandas as pd

NAME = "split"  # RecBole looks for NAME/NAME.<part>.inter
PARTS = ("train", "valid", "test")
COLUMNS = ["user", "item", "timestamp"]


def read_split(folder, more=()):
    """The three parts of a split as frames, each in time order per user."""
    return {part: read_part(folder / f"{part}.csv", [*COLUMNS, *more]) for part in PARTS}


def read_part(path, columns):
    """Rows of one part sorted by user and time; rows with equal times keep the order of the file."""
    rows = pd.read_csv(path)
    if missing := [c for c in columns if c not in rows]:
        raise ValueError(
            f"{path}: column {missing[0]!r} is missing, the columns are {list(rows)}; "
            f"write the header {','.join(columns)}"
        )
    for column in columns:
        if rows[column].dtype.kind != "i" or rows[column].min() < 0 and column != "timestamp":
            raise ValueError(
                f"{path}: column {column!r} ({len(rows)} rows) must hold whole numbers, "
                f"codes from 0; got {rows[column].dtype}, minimum {rows[column].min()}"
            )
    order = np.lexsort((rows["timestamp"], rows["user"]))
    return rows.iloc[order].reset_index(drop=True)


def write_pairs(split, folder):
    """For models of user and item: one line a row, in the order of the split."""
    for part, rows in split.items():
        pairs = rows[["user", "item"]].set_axis(["user_id:token", "item_id:token"], axis=1)
        pairs.to_csv(folder / f"{NAME}.{part}.inter", sep="\t", index=False)


def write_labels(split, source, folder):
    """For models of features: one line a row with its label, and the tables of users and items."""
    for part, rows in split.items():
        names = ["user_id:token", "item_id:token", "label:float"]
        pairs = rows[["user", "item", "label"]].set_axis(names, axis=1)
        pairs.to_csv(folder / f"{NAME}.{part}.inter", sep="\t", index=False)
    write_tables(source, folder)


def write_tables(source, folder):
    """What is known of users and items: a line each."""
    for side in ("user", "item"):
        table = pd.read_csv(source / f"{side}s.csv").rename(columns={side: f"{side}_id"})
        kind = {c: "token" if table[c].dtype.kind == "i" else "token_seq" for c in table}
        table = table.rename(columns={c: f"{c}:{k}" for c, k in kind.items()})
        table.to_csv(folder / f"{NAME}.{side}", sep="\t", index=False)


def write_sequences(split, folder, window, test_history):
    """For sequence models: one line a target, with at most `window` items that came before it."""
    train, valid, test = (split[part] for part in PARTS)
    seen = {"train": train, "train+valid": pd.concat([train, valid], ignore_index=True)}[
        test_history
    ]
    write_targets(folder / f"{NAME}.train.inter", training_targets(train, window))
    write_targets(folder / f"{NAME}.valid.inter", held_out_targets(valid, histories(train), window))
    write_targets(folder / f"{NAME}.test.inter", held_out_targets(test, histories(seen), window))


def histories(rows):
    """User -> items, oldest first."""
    order = np.lexsort((rows["timestamp"], rows["user"]))
    users, starts = np.unique(rows["user"].to_numpy()[order], return_index=True)
    items = rows["item"].to_numpy()[order]
    return dict(zip(users, np.split(items, starts[1:]), strict=True))


def training_targets(train, window):
    """Every item of a user but the first, each with the items before it: RecBole's own augmentation."""
    for user, items in histories(train).items():
        for at in range(1, len(items)):
            yield user, items[max(0, at - window) : at], items[at]


def held_out_targets(rows, before, window):
    """Every held-out item with the latest items of its user's history."""
    if cold := set(rows["user"]) - set(before):
        raise ValueError(
            f"{len(cold)} of {rows['user'].nunique()} users have a target but no history "
            f"(user {min(cold)} first); leave them out of the split for a sequence model"
        )
    for user, item in zip(rows["user"], rows["item"], strict=True):
        yield user, before[user][-window:], item


def write_targets(path, targets):
    """One line a target: user, the items before it, the target."""
    with open(path, "w", encoding="utf-8") as file:
        file.write("user_id:token\titem_id_list:token_seq\titem_id:token\n")
        for user, items, target in targets:
            file.write(f"{user}\t{' '.join(map(str, items))}\t{target}\n")
