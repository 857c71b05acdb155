"""Leaves behind what `hetegen` does, in no time: `python THIS DIRECTORY VERB --config FILE key=value ...`.

Every call adds its verb to DIRECTORY/calls; where DIRECTORY/broken is, training fails. The AUC tells seed and
`evaluation.cold_user_rows`. It imports nothing that takes long.
"""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

SPLITS = ("valid", "test")
ROWS = list(range(40))
LABELS = [row % 2 for row in ROWS]
USERS = [row + 1 for row in ROWS]


def main(directory, verb, _, config_path, *words):
    with (Path(directory) / "calls").open("a") as file:
        file.write(f"{verb}\n")
    config = read_config(config_path, [word for word in words if "=" in word])
    if verb == "prepare":
        prepare(Path(config["data"]["prepared_dir"]))
        return
    if (Path(directory) / "broken").exists():
        sys.exit("error: out of luck")
    place = Path(config["run_dir"]) / (words[words.index("--stage") + 1] if verb == "evaluate" else verb)
    if verb != "evaluate":
        train(config, place)
    if verb == "evaluate" or (verb != "pretrain" and not (place / "evaluation.json").exists()):
        evaluate(config, place)


def read_config(path, overrides):
    config = yaml.safe_load(Path(path).read_text())
    for key, text in (override.split("=", 1) for override in overrides):
        *parents, last = key.split(".")
        section = config
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = float(text) if "e-" in text else yaml.safe_load(text)
    return config


def prepare(place):
    columns = {"__row_id": ROWS, "__timestamp": ROWS, "__user_key": USERS}
    for split in SPLITS:
        write({**columns, "__user_rows": ROWS, "__item_rows": ROWS}, place / split)


def train(config, place):
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    (place / "done.json").write_text(json.dumps({"steps": 9, "seconds": 1.5}))


def evaluate(config, place):
    auc = 0.6 + 0.01 * config["seed"] + 0.001 * config.get("evaluation", {}).get("cold_user_rows", 5)
    result = {"n": 40, "positives": 20, "auc": auc, "log_loss": 0.6, "gauc": None, "roc": [], "slices": {}}
    for split in SPLITS:
        scores = [0.01 * row for row in ROWS]
        columns = {"row_id": ROWS, "probability": scores, "label": LABELS, "user_key": USERS}
        write(columns, place / "predictions" / split)
    splits = dict.fromkeys(SPLITS, result)
    about = {"run": "", "stage": place.name, "checkpoint": "", "step": 9, "splits": splits}
    (place / "evaluation.json").write_text(json.dumps(about))


def write(columns, place):
    place.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), place / "part-0.parquet")


if __name__ == "__main__":
    main(*sys.argv[1:])
