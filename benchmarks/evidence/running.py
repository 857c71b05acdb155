"""One run in a process of its own: its stages, its evaluation, and what that took."""

import shutil
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.evidence.plan import AnyRun, Run
from benchmarks.evidence.records import Record
from benchmarks.evidence.sequences import SequenceRun, follow, results_by_way
from benchmarks.evidence.slices import slice_metrics
from benchmarks.evidence.verbs import Program, do_verb
from benchmarks.evidence.workers import RunError, Workers
from hetegen_rec import cli
from hetegen_rec.config.data import Split
from hetegen_rec.evaluation.errors import EvaluationError
from hetegen_rec.evaluation.results import read_evaluation
from hetegen_rec.evaluation.significance import read_predictions
from hetegen_rec.files import replace_directory
from hetegen_rec.training.attempts import is_done

HETEGEN: Program = cli.main

_EVALUATED: tuple[Split, ...] = ("valid", "test")
_LEFT_OUT = ("roc", "calibration_bins", "slices")
"""Curves, and slices by other bounds."""


def prepare(run: AnyRun, workers: Workers, log: Path, core: int) -> None:
    """Prepares the data of a run's data set, for all of its runs.

    Raises:
        RunError, StoppedError: see `Workers.run`.
    """
    workers.run(do_verb, (HETEGEN, "prepare", run), log, core)


def execute(run: AnyRun, core: int, *, out: Path, workers: Workers, commit: str) -> Record:
    """Trains and evaluates whatever of a run is not done yet.

    Args:
        run: which one; its data are prepared.
        core: on which it runs.
        out: directory of everything.
        workers: where its process is counted in.
        commit: of the code.

    Returns:
        The record of the run, finished or failed.

    Raises:
        StoppedError: it was stopped.
    """
    record = Record(
        run=run.id,
        data_set=run.data_set,
        method=run.method,
        option=run.option,
        seed=run.seed,
        status="failed",
        directory=str(Path(run.config.run_dir).relative_to(out)),
        commit=commit,
    )
    try:
        log = out / "logs" / f"{run.id}.log"
        if isinstance(run, SequenceRun):
            usage = workers.run(follow, (HETEGEN, run), log, core)
            record = replace(record, ways=results_by_way(run))
        else:
            usage = workers.run(train_and_evaluate, (HETEGEN, run), log, core)
            record = replace(record, splits=_metrics(run))
            _keep_predictions(run, predictions_dir(out, run.id))
    except (RunError, EvaluationError) as error:
        return replace(record, error=str(error), finished=_now())
    return replace(
        record,
        status="done",
        wall_seconds=round(usage.seconds, 1),
        cpu_seconds=round(usage.cpu_seconds, 1),
        peak_memory_mib=round(usage.peak_memory_mib, 1),
        finished=_now(),
    )


def predictions_dir(out: Path, run_id: str) -> Path:
    """Where the test predictions of a run stay, whatever else is scored with the same training later."""
    return out / "predictions" / run_id


def train_and_evaluate(program: Program, run: Run) -> None:
    """Does whatever of a run is not done yet, in this process; `sys.exit` if that fails.

    A killed run goes on in here: a stage that is done takes no time.
    """
    for stage in run.stages:
        do_verb(program, stage, run, "--no-report")
        if not is_done(run.config, stage):
            sys.exit(f"error: {stage} was stopped before it was done")
    if run.evaluate:  # with other settings for scoring than those by which the click stage evaluates itself
        do_verb(program, "evaluate", run, "--no-report", "--stage", run.click_stage, *run.evaluate)


def _metrics(run: Run) -> dict[str, dict[str, Any]]:
    stage_dir = run.config.stage_dir(run.click_stage)
    evaluation = read_evaluation(stage_dir)
    if evaluation is None:
        raise RunError(f"{stage_dir} holds no evaluation")
    splits: dict[str, dict[str, Any]] = {}
    for split in _EVALUATED:
        predictions = read_predictions(stage_dir / "predictions" / split)
        if predictions is None:
            raise RunError(f"{stage_dir} holds no predictions of {split}")
        result = evaluation["splits"][split]
        splits[split] = {key: value for key, value in result.items() if key not in _LEFT_OUT}
        splits[split]["slices"] = slice_metrics(run.config, split, predictions)
    return splits


def _keep_predictions(run: Run, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(run.config.stage_dir(run.click_stage) / "predictions" / "test", partial)
    replace_directory(partial, target)


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")
