"""What pre-training is worth where few rows tell whether there was a click.

    python -m benchmarks.few_clicks --out benchmarks/results/few_clicks.md

All training rows of a log are there to pre-train on, without their label; a share of them, drawn at random,
has one and trains DeepFM: on the pre-trained tables, or from scratch. Data sets and settings are those of
the grid of `make evidence`. From scratch may know the ids of all rows, or those of its labelled rows alone,
in which unknown ids share a row. For each share, each side takes what is best on valid, by the mean over
all seeds. A run that is done is not trained again.
"""

import argparse
import math
import statistics
import sys
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.evidence.cells import spread_text
from benchmarks.evidence.comparing import LEVEL, paired_p_value, spread_of
from benchmarks.evidence.grid import DataSet, Overrides, as_arguments, load_grid
from benchmarks.evidence.places import Places
from benchmarks.evidence.verbs import do_verb
from benchmarks.evidence.workers import RunError, Workers
from benchmarks.machine import how_made
from hetegen_rec.cli import main as hetegen
from hetegen_rec.config.run import Stage
from hetegen_rec.evaluation.results import read_evaluation

GRID = Path(__file__).with_name("evidence.yaml")
_WIDTH = 115
_MODEL: Overrides = {"model.backbone.name": "deepfm", "model.noise.label_in_set": False}
# Larger batches would be few steps.
_FEW: Overrides = {"train.batch_size": 128, "train.evaluations_per_epoch": 1}
_STRONGER = 10.0  # few rows want more L2 than the grid's settings have


@dataclass(frozen=True)
class Side:
    """A way to a click model."""

    name: str
    stage: Stage
    keeps_ids: bool
    """Whether tables have the ids of all rows, or those of the labelled rows alone."""


PRETRAINED = (Side("finetune", "finetune", keeps_ids=True),)
FROM_SCRATCH = (Side("scratch", "scratch", keeps_ids=True), Side("scratch_own", "scratch", keeps_ids=False))


@dataclass(frozen=True)
class Told:
    """What `hetegen` is told after a verb."""

    config_path: str
    overrides: Sequence[str]


@dataclass(frozen=True)
class Log:
    """A data set and what is asked about it."""

    name: str
    data: DataSet
    places: Overrides
    """Where its files are, and all rows encoded."""
    common: Overrides
    """Of all runs."""
    shares: Sequence[float]
    out: Path

    @property
    def options(self) -> dict[str, Overrides]:
        """The settings of click training to choose among: those of the grid, and one with more L2."""
        strongest = max(self.data.search.values(), key=lambda one: float(one["click.table_l2"]))
        stronger = {**strongest, "click.table_l2": _STRONGER * float(strongest["click.table_l2"])}
        return {**self.data.search, "stronger": stronger}

    def rows(self, seed: int, share: float) -> Path:
        """The file of the labelled rows."""
        return self.out / f"seed-{seed}" / f"share-{share:g}" / "rows.parquet"

    def run_dir(self, seed: int, share: float, side: Side, option: str) -> Path:
        """Where one click model is trained."""
        return self.rows(seed, share).with_name(f"{side.name}-{option}")

    def epochs(self, share: float) -> int:
        """Of click training, the same for both sides: more where they are short. Early stopping ends it."""
        return math.ceil(self.data.epochs.total / math.sqrt(share))

    def told(self, click_stage: Stage, settings: Overrides) -> Told:
        """The configuration and its overrides; `settings` hold before those of the grid."""
        found = {**self.places, **self.common, **self.data.overrides, **_MODEL, **settings}
        return Told(self.data.config, as_arguments(found, click_stage))


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is missing and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    parser.add_argument("--grid", type=Path, default=GRID, help="data sets, epochs and settings")
    parser.add_argument("--data-sets", nargs="+", metavar="NAME", help="default: all of the grid with files")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1], metavar="SHARE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2, help="runs side by side")
    parser.add_argument("--runs", type=Path, default=Path("runs/few_clicks"), help="where the runs go")
    parser.add_argument("--out", type=Path, help="file for the table")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    grid = load_grid(options.grid)
    places = Places(grid, options.runs, options.data_root)
    there = [name for name, one in grid.data_sets.items() if one.files and name not in places.missing]
    chosen = options.data_sets or there
    if not chosen or not set(chosen) <= set(there):
        parser.error(f"--data-sets: below {options.data_root} are: {', '.join(there) or 'none'}")
    logs = [
        Log(
            name,
            grid.data_sets[name],
            places.data(name),
            grid.overrides,
            options.shares,
            options.runs / name,
        )
        for name in chosen
    ]
    jobs = [(log, seed) for seed in range(options.seeds) for log in logs]
    workers = Workers()
    try:
        for log in logs:
            workers.run(prepare, (log,), log.out / "prepare.log", 0)
        with ThreadPoolExecutor(options.cores) as pool:
            by_core = [jobs[core :: options.cores] for core in range(options.cores)]
            list(pool.map(partial(_follow, workers), range(options.cores), by_core))
    except RunError as error:
        sys.exit(f"error: {error}")
    lines = [*report(logs, options.seeds), "", how_made("benchmarks.few_clicks", given)]
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def _follow(workers: Workers, core: int, jobs: Sequence[tuple[Log, int]]) -> None:
    for log, seed in jobs:
        workers.run(train, (log, seed), log.out / f"seed-{seed}.log", core)


def prepare(log: Log) -> None:
    """Encodes all rows of a log."""
    do_verb(hetegen, "prepare", log.told("finetune", {}))


def train(log: Log, seed: int) -> None:
    """Pre-trains with one seed, and trains every click model that is compared."""
    settings = {
        "seed": seed,
        "run_dir": str(_pretrained(log, seed)),
        "stages.pretrain.epochs": log.data.epochs.pretrain,
    }
    do_verb(hetegen, "pretrain", log.told("finetune", settings), "--no-report")
    for share in log.shares:
        write_share(log, share, seed)
        for side in (*PRETRAINED, *FROM_SCRATCH):
            for option in log.options:
                told = log.told(side.stage, settings_of(log, seed, share, side, option))
                do_verb(hetegen, side.stage, told, "--no-report")


def settings_of(log: Log, seed: int, share: float, side: Side, option: str) -> Overrides:
    """What a click model is trained with."""
    rows = log.rows(seed, share)
    settings = {
        **_FEW,
        **log.options[option],
        "seed": seed,
        "run_dir": str(log.run_dir(seed, share, side, option)),
        "data.train": str(rows),
        "data.prepared_dir": str(rows.with_name("kept" if side.keeps_ids else "own")),
        "click.epochs": log.epochs(share),
    }
    if side.keeps_ids:
        settings["data.keep_ids_of"] = log.places["data.prepared_dir"]
    if side.stage == "finetune":
        evaluation = read_evaluation(_pretrained(log, seed) / "pretrain")
        assert evaluation is not None  # the end of pre-training writes it
        settings["click.start_from"] = evaluation["checkpoint"]
    return settings


def write_share(log: Log, share: float, seed: int) -> None:
    """Writes the labelled rows; with the same seed, a larger share has all rows of a smaller one."""
    target = log.rows(seed, share)
    if target.exists():
        return
    rows = pq.read_table(sorted(Path(log.places["data.train"]).parent.glob("*.parquet")))
    order = np.random.default_rng(seed).permutation(rows.num_rows)
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows.take(np.sort(order[: math.ceil(share * rows.num_rows)])), target)


def _pretrained(log: Log, seed: int) -> Path:
    """The run directory of pre-training."""
    return log.out / f"seed-{seed}" / "all"


@dataclass(frozen=True)
class Found:
    """The best of one side at one share: an AUC of every seed."""

    what: str
    valid: Sequence[float]
    test: Sequence[float]


def best(log: Log, share: float, sides: Sequence[Side], seeds: int) -> Found:
    """The side and option with the highest mean AUC on valid."""
    found = []
    for side in sides:
        for option in log.options:
            runs = [
                read_evaluation(log.run_dir(seed, share, side, option) / side.stage) for seed in range(seeds)
            ]
            splits = [one["splits"] for one in runs if one is not None]
            valid, test = ([one[split]["auc"] for one in splits] for split in ("valid", "test"))
            found.append(Found(f"{side.name}, {option}", valid, test))
    return max(found, key=lambda one: statistics.mean(one.valid))


def report(logs: Sequence[Log], seeds: int) -> Iterator[str]:
    """Markdown lines."""
    yield from ("# Pre-training where few rows are labelled", "")
    yield from textwrap.wrap(
        f"Test AUC of DeepFM, mean and standard deviation of {seeds} seed(s), each with labelled rows of its "
        "own. All training rows pre-train, without label; the share trains on clicks. Each side has what is "
        "best on valid. p is of a paired t-test over seeds, not corrected for the number "
        f"of lines; bold below {LEVEL}.",
        _WIDTH,
    )
    yield ""
    yield "| data set | share | labelled | from scratch | pre-trained | difference | p | chosen on valid |"
    yield "|---|---:|---:|---:|---:|---:|---:|---|"
    for log in logs:
        for share in log.shares:
            theirs, ours = (best(log, share, sides, seeds) for sides in (FROM_SCRATCH, PRETRAINED))
            differences = [one - other for one, other in zip(ours.test, theirs.test, strict=True)]
            p_value = paired_p_value(differences)
            rows = pq.read_metadata(log.rows(0, share)).num_rows
            cells = (
                log.name,
                f"{100 * share:g} %",
                f"{rows:,}",
                spread_text(spread_of(theirs.test)),
                spread_text(spread_of(ours.test)),
                f"{statistics.mean(differences):+.4f}",
                "n/a" if p_value is None else f"**{p_value:.3f}**" if p_value < LEVEL else f"{p_value:.3f}",
                f"{theirs.what} / {ours.what}",
            )
            yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
