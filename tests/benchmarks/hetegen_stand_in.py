"""Leaves behind what `hetegen` does, in no time, and notes how it was called."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from hetegen_rec.evaluation.incremental import SequenceResults, UpdateResult

SPLITS = ("valid", "test")
ROWS = list(range(40))
LABELS = [row % 2 for row in ROWS]
USERS = [row + 1 for row in ROWS]


class StandIn:
    """In the place of `hetegen_rec.cli.main`, in whichever process: everything it knows stands in files.

    The AUC tells seed and `evaluation.cold_user_rows`; over the periods of a log seed, way and period.
    """

    def __init__(self, directory):
        self._calls, self._broken = directory / "calls", directory / "broken"
        self._stopped = directory / "stopped"

    def calls(self):
        """The verbs since the last time."""
        return [verb for verb, _ in self._take()]

    def processes(self):
        """Of each call since the last time."""
        return [process for _, process in self._take()]

    def breaks(self):
        """From now on, training fails."""
        self._broken.touch()

    def works(self):
        self._broken.unlink()

    def is_stopped(self):
        """From now on, models that follow a log do not reach its end."""
        self._stopped.touch()

    def _take(self):
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        self._calls.unlink(missing_ok=True)
        return [line.split() for line in lines]

    def __call__(self, words):
        verb, _, config_path, *rest = words
        with self._calls.open("a") as file:
            file.write(f"{verb} {os.getpid()}\n")
        config = read_config(config_path, [word for word in rest if "=" in word])
        if verb == "prepare":
            prepare(Path(config["data"]["prepared_dir"]))
            return 0
        if self._broken.exists():
            print("error: out of luck")
            return 2
        if verb == "incremental":
            follow(config, last=4 - self._stopped.exists())
            return 0
        place = Path(config["run_dir"]) / (rest[rest.index("--stage") + 1] if verb == "evaluate" else verb)
        if verb != "evaluate":
            train(config, place)
        if verb != "pretrain":
            evaluate(config, place)
        return 0


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


def follow(config, last):
    """Tests all ways on periods 3 to `last`, of 4; the first model is tested on period 2."""
    ways = ("finetune", "retrain", "fesail")
    results = SequenceResults("", "scratch", config["seed"], ways, [{"number": n} for n in (1, 2, 3, 4)])
    for period in range(2, last + 1):
        for place, way in enumerate(ways if period > 2 else (None,)):
            auc = 0.6 + 0.01 * config["seed"] + 0.001 * place + 0.1 * (period - 3)
            tested, done = {"auc": auc, "log_loss": 0.5}, {"steps": 2, "seconds": 1.5 + place}
            rows = 100 * (place + 1) + 10 * period
            results.updates.append(UpdateResult.of(way, period - 1, rows, done, tested))
    place = Path(config["run_dir"]) / "incremental"
    place.mkdir(parents=True, exist_ok=True)
    results.write(place)


def write(columns, place):
    place.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), place / "part-0.parquet")
