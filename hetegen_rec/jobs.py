"""The verbs of the project: what `hetegen VERB` and the scripts under launch/ do."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.run import RunConfig, Split, Stage
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.evaluation.predictions import Predictions
from hetegen_rec.evaluation.report import write_report
from hetegen_rec.evaluation.results import write_evaluation
from hetegen_rec.evaluation.tables import results_tables
from hetegen_rec.training import stages
from hetegen_rec.training.scoring import measure, score_rows
from hetegen_rec.training.setup import build_sharded, open_split

logger = logging.getLogger(__name__)

_CLICK_STAGES: tuple[Stage, ...] = ("finetune", "joint", "scratch")


@dataclass(frozen=True)
class Job:
    """One verb's work: the run, this process's place in it, and what the command line chose."""

    config: RunConfig
    runtime: Runtime
    stage: Stage | None = None
    """The trained stage to evaluate or predict with; default: the first trained click stage."""
    checkpoint: str | None = None
    """A checkpoint's directory; default: the stage's best, or its newest."""
    split: Split = "test"
    """The split to predict."""


def prepare_data(job: Job) -> None:
    """Encodes the raw data, once."""
    stages.prepare_data(job.config, job.runtime)


def train(stage: Stage) -> Callable[[Job], None]:
    """The verb that trains one stage and, where it scores clicks, evaluates it."""

    def verb(job: Job) -> None:
        stages.run_stage(job.config, stage, job.runtime)
        if stage in _CLICK_STAGES:
            evaluate(replace(job, stage=stage, checkpoint=None))
        elif job.runtime.is_main:
            write_report(job.config.run_dir)

    return verb


def evaluate(job: Job) -> None:
    """Scores the validation and test rows with one stage's best checkpoint; writes and shows it."""
    trained = _load_trained(job)
    directory = job.config.stage_dir(trained.stage)
    results: dict[str, dict[str, Any]] = {}
    temperature = None
    for split in job.config.splits():
        if split == "train":
            continue
        predictions = trained.score(split)
        results[split] = measure(predictions, job.config, trained.statistics, job.runtime, temperature)
        if split == "valid":
            temperature = results[split]["temperature"]
        _write_predictions(predictions, directory / "predictions" / split, job.runtime)
    if job.runtime.is_main:
        _show_evaluation(trained, results)


def predict(job: Job) -> None:
    """Writes row id and click probability of every row of a split."""
    if job.split not in job.config.splits():
        raise ConfigError(f"data.{job.split} names no files, so there is nothing to predict")
    trained = _load_trained(job)
    directory = job.config.stage_dir(trained.stage) / "predictions" / job.split
    _write_predictions(trained.score(job.split), directory, job.runtime)
    if job.runtime.is_main:
        Console().print(f"predictions of {job.split}: {directory}")


def report(job: Job) -> None:
    """Collects what the run directory holds into report.html."""
    if job.runtime.is_main:
        Console().print(f"report: {write_report(job.config.run_dir)}")


def demo(job: Job) -> None:
    """Pre-trains, fine-tunes and trains from scratch, skipping what is done; compares and reports."""
    wanted: tuple[Stage, ...] = ("pretrain", "finetune", "scratch")
    for stage in wanted:
        if job.runtime.broadcast(stages.is_done(job.config, stage)):
            logger.info("%s is done already in %s", stage, job.config.stage_dir(stage))
            continue
        train(stage)(job)
    if job.runtime.is_main:
        console = Console()
        console.print(results_tables(job.config.run_dir))
        console.print(f"report: {write_report(job.config.run_dir).resolve()}")


@dataclass
class Trained:
    """A trained stage, ready to score."""

    config: RunConfig
    runtime: Runtime
    stage: Stage
    checkpoint: Path
    step: int
    model: Any
    statistics: Statistics

    def score(self, split: Split) -> Predictions:
        """This rank's share of a split, scored."""
        reader = open_split(self.config, split, self.statistics, self.runtime)
        return score_rows(self.model, reader, self.runtime)


def _load_trained(job: Job) -> Trained:
    config, runtime = job.config, job.runtime
    stage = job.stage or _first_trained(config)
    checkpoints = stages.open_checkpoints(config, stage, runtime)
    path = Path(job.checkpoint) if job.checkpoint else checkpoints.best() or checkpoints.latest()
    if path is None:
        raise ConfigError(
            f"{config.stage_dir(stage)} holds no checkpoint; train that stage first: `hetegen {stage}`"
        )
    statistics = stages.prepare_data(config, runtime)
    model = build_sharded(config, stage, statistics, runtime)
    info = checkpoints.load(path, model.dmp)
    return Trained(config, runtime, stage, path, info.step, model.dmp, statistics)


def _first_trained(config: RunConfig) -> Stage:
    for stage in _CLICK_STAGES:
        if (config.stage_dir(stage) / stages.CHECKPOINTS).exists():
            return stage
    raise ConfigError(
        f"{config.run_dir} holds no trained click stage; run `finetune`, `joint` or `scratch` first"
    )


def _write_predictions(predictions: Predictions, directory: Path, runtime: Runtime) -> None:
    """One Parquet file a rank: row_id, probability, label, and user_key where there is one."""
    with runtime.together(f"clearing {directory}"):
        if runtime.is_main:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
    rows = predictions.rows
    columns: dict[str, Any] = {
        "row_id": rows.row_ids,
        "probability": rows.probabilities.astype(np.float32),
        "label": rows.labels.astype(np.int8),
    }
    if "user_key" in rows.context:
        columns["user_key"] = rows.context["user_key"]
    with runtime.together(f"writing {directory}"):
        path = directory / f"part-{runtime.rank:05d}.parquet"
        pq.write_table(pa.table(columns), path, compression="zstd")


def _show_evaluation(trained: Trained, results: dict[str, dict[str, Any]]) -> None:
    config = trained.config
    directory = config.stage_dir(trained.stage)
    write_evaluation(
        directory,
        {
            "run": config.name,
            "stage": trained.stage,
            "checkpoint": str(trained.checkpoint),
            "step": trained.step,
            "splits": results,
        },
    )
    Console().print(results_tables(config.run_dir))
    write_report(config.run_dir)
