"""Runs of `hetegen incremental`: all ways of following a log, on one data set with one seed."""

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.evidence.grid import Grid, Incremental, as_arguments
from benchmarks.evidence.identity import decisive, digest
from benchmarks.evidence.places import Places
from benchmarks.evidence.verbs import Program, do_verb
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.loading import load_config
from hetegen_rec.config.run import RunConfig
from hetegen_rec.evaluation.incremental import RESULTS_FILE
from hetegen_rec.training.incremental import sequence_dir


@dataclass(frozen=True)
class SequenceRun:
    """One data set, followed in every way with one seed."""

    method: ClassVar[str] = "incremental"
    """What its records and messages name it by."""

    data_set: str
    seed: int
    config_path: str
    config: RunConfig = field(repr=False)
    overrides: tuple[str, ...] = field(repr=False)
    """`key=value` that train it."""
    id: str = ""
    """Digest of what decides about its results."""

    @property
    def option(self) -> str:
        """The ways, which all are trained in one run."""
        return ", ".join(self.config.incremental.ways)

    def __str__(self) -> str:
        return f"{self.data_set} / {self.method} / {self.option} / seed {self.seed}"


def sequence_runs(grid: Grid, places: Places) -> list[SequenceRun]:
    """All that a grid asks for, seed after seed, on the data sets that are there.

    Raises:
        ConfigError: a configuration is wrong, or one that cannot be followed.
    """
    section = grid.incremental
    if section is None:
        return []
    names = [name for name in section.data_sets if name not in places.missing]
    first = [_first(grid, section, name, places) for name in names]
    return [_with_seed(one, seed, places) for seed in range(section.seeds) for one in first]


def _first(grid: Grid, section: Incremental, name: str, places: Places) -> SequenceRun:
    """A run without seed and place, and so without an id."""
    where = grid.data_sets[name]
    overrides = as_arguments(
        {
            "incremental.stage": section.stage,
            **grid.overrides,
            **where.overrides,
            f"stages.{section.stage}.epochs": where.epochs.total,
            **section.overrides,
            **section.data_sets[name],
            **places.data(name),
        },
        section.stage,
    )
    try:
        config = load_config(where.config, overrides)
        _refuse_unfit(config, section, where.config)
    except ConfigError as error:
        raise ConfigError(f"incremental.data_sets.{name}: {error}") from error
    return SequenceRun(name, 0, where.config, config, tuple(overrides))


def _refuse_unfit(config: RunConfig, section: Incremental, path: str) -> None:
    if config.features.timestamp is None:
        raise ConfigError(
            f"{path} names no `features.timestamp`, by which a log is cut into periods; add it, or leave the "
            "data set out here"
        )
    if config.incremental.stage != section.stage:
        raise ConfigError(
            f"an override makes `incremental.stage` {config.incremental.stage}, and the grid's is "
            f"{section.stage}; set `incremental: {{stage: {config.incremental.stage}}}` of the grid instead"
        )
    if section.baseline not in config.incremental.ways:
        ways = ", ".join(config.incremental.ways)
        raise ConfigError(f"`incremental.baseline: {section.baseline}` is none of its ways: {ways}")


def _with_seed(first: SequenceRun, seed: int, places: Places) -> SequenceRun:
    config = first.config.model_copy(update={"seed": seed})
    stage = config.incremental.stage
    name = digest([first.method, first.data_set, stage, decisive(config, (stage,))])
    run_dir = places.run_dir(first.data_set, name)
    return replace(
        first,
        seed=seed,
        config=config.model_copy(update={"run_dir": run_dir}),
        overrides=(*first.overrides, f"seed={seed}", f"run_dir={run_dir}"),
        id=name,
    )


def follow(program: Program, run: SequenceRun) -> None:
    """Does whatever of a run is not done yet, in this process; `sys.exit` if that fails."""
    do_verb(program, "incremental", run)
    if not _is_whole(_results(run)):
        sys.exit(f"error: {run.method} was stopped before it was done")


def results_by_way(run: SequenceRun) -> dict[str, dict[str, Any]]:
    """What a whole run left: `Record.ways`."""
    results = _results(run)
    return {way: dict(_of_way(results, way)) for way in results["ways"]}


def _of_way(results: dict[str, Any], way: str) -> Iterator[tuple[str, Any]]:
    own = [update for update in results["updates"] if update["way"] == way]
    yield from results["means"][way].items()
    yield "rows", statistics.mean(update["train_rows"] for update in own)
    yield "auc_by_period", {str(update["tested_on"]): update["metrics"]["auc"] for update in own}


def _is_whole(results: dict[str, Any]) -> bool:
    """Whether every way was tested on the last period."""
    tested = {
        update["way"] for update in results["updates"] if update["tested_on"] == len(results["periods"])
    }
    return tested >= set(results["ways"])


def _results(run: SequenceRun) -> dict[str, Any]:
    path: Path = sequence_dir(run.config) / RESULTS_FILE
    if not path.exists():
        return {"ways": run.config.incremental.ways, "periods": [], "updates": []}
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results
