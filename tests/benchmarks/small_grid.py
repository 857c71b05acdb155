"""A grid of two small data sets and two methods, and records of its runs: for the evidence runner."""

from pathlib import Path

import yaml
from tiny_run import tiny_values, write_config

from benchmarks.evidence.grid import load_grid
from benchmarks.evidence.plan import Plan, Run
from benchmarks.evidence.records import Record
from benchmarks.evidence.sequences import SequenceRun

METHODS = {
    "scratch": {"title": "From scratch", "stages": ["scratch"]},
    "uniform": {
        "title": "Uniform",
        "stages": ["pretrain", "finetune"],
        "overrides": {"model.balance.form": "uniform"},
    },
}
OTHER = {"title": "Other slices", "of": "scratch", "evaluate": {"evaluation.cold_user_rows": 9}}
FOLLOWED = {"seeds": 2, "data_sets": {"ads": {}, "shop": {"incremental.periods": 5}}}
SEARCH = {"light": {"click.table_l2": "1e-6"}, "strong": {"click.table_l2": 0.01}}


def grid_values(directory, **changes):
    """A grid of two small data sets, with a configuration that is really there."""
    config = str(write_config(directory, tiny_values(directory)))
    one = {"config": config, "epochs": {"total": 5, "pretrain": 2}, "search": SEARCH}
    return {
        "seeds": 3,
        "baseline": "scratch",
        "data_sets": {"ads": one, "shop": {**one, "overrides": {"data.source.seed": 1}}},
        "methods": METHODS,
        **changes,
    }


def load(directory, **changes):
    path = directory / "grid.yaml"
    path.write_text(yaml.safe_dump(grid_values(directory, **changes), sort_keys=False), encoding="utf-8")
    return load_grid(path)


def plan_of(directory: Path, **changes) -> Plan:
    return Plan(load(directory, **changes), directory / "out", directory)


def record(
    run: Run, valid: float = 0.7, test: float = 0.7, status: str = "done", directory: str = "runs", **more
) -> Record:
    splits = {"valid": {"auc": valid}, "test": {"auc": test, **more}}
    return Record(
        run.id,
        run.data_set,
        run.method,
        run.option,
        run.seed,
        status,
        directory,
        splits if status == "done" else {},
        wall_seconds=40.0,
        cpu_seconds=30.0,
        peak_memory_mib=500.0,
        commit="abc",
        error="" if status == "done" else "exit code 2: error: no luck",
    )


def sequence_record(run: SequenceRun, ways: dict[str, dict]) -> Record:
    return Record(run.id, run.data_set, run.method, run.option, run.seed, "done", ways=ways)


def plan_with_strategy(directory: Path) -> Plan:
    """With a method that differs from `scratch` only in how it scores."""
    return plan_of(directory, methods={"other": OTHER, **METHODS})
