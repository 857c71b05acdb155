"""The verbs of the project: what `hetegen VERB` and the scripts under launch/ do."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
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
from hetegen_rec.evaluation.results import StageResult, comparison_table, metrics_table, write_evaluation
from hetegen_rec.training import stages
from hetegen_rec.training.scoring import measure, score_rows
from hetegen_rec.training.setup import build_sharded, open_split

logger = logging.getLogger(__name__)

_CLICK_STAGES: tuple[Stage, ...] = ("finetune", "joint", "scratch")


@dataclass(frozen=True)
class Choice:
    """What a verb is applied to, where the configuration leaves a choice."""

    stage: Stage | None = None
    """The trained stage to evaluate or predict with; default: the first trained click stage."""
    checkpoint: str | None = None
    """A checkpoint's directory; default: the stage's best, or its newest."""
    split: Split = "test"
    """The split to predict."""


def prepare_data(config: RunConfig, runtime: Runtime, choice: Choice) -> None:
    """Encodes the raw data, once."""
    stages.prepare_data(config, runtime)


def train(stage: Stage) -> Callable[[RunConfig, Runtime, Choice], None]:
    """The verb that trains one stage and, where it scores clicks, evaluates it."""

    def verb(config: RunConfig, runtime: Runtime, choice: Choice) -> None:
        stages.run_stage(config, stage, runtime)
        if stage in _CLICK_STAGES:
            evaluate(config, runtime, Choice(stage=stage))
        elif runtime.is_main:
            write_report(config.run_dir)

    return verb


def evaluate(config: RunConfig, runtime: Runtime, choice: Choice) -> None:
    """Scores the validation and test rows with one stage's best checkpoint; writes and shows it."""
    trained = _load_trained(config, runtime, choice)
    directory = config.stage_dir(trained.stage)
    results: dict[str, dict[str, Any]] = {}
    temperature = None
    for split in config.splits():
        if split == "train":
            continue
        predictions = trained.score(split)
        results[split] = measure(predictions, config, trained.statistics, runtime, temperature)
        if split == "valid":
            temperature = results[split]["temperature"]
        write_predictions(predictions, directory / "predictions" / split, runtime)
    if runtime.is_main:
        _show_evaluation(config, trained, results)


def predict(config: RunConfig, runtime: Runtime, choice: Choice) -> None:
    """Writes row id and click probability of every row of a split."""
    if choice.split not in config.splits():
        raise ConfigError(f"data.{choice.split} names no files, so there is nothing to predict")
    trained = _load_trained(config, runtime, choice)
    directory = config.stage_dir(trained.stage) / "predictions" / choice.split
    write_predictions(trained.score(choice.split), directory, runtime)
    if runtime.is_main:
        Console().print(f"predictions of {choice.split}: {directory}")


def report(config: RunConfig, runtime: Runtime, choice: Choice) -> None:
    """Collects what the run directory holds into report.html."""
    if runtime.is_main:
        Console().print(f"report: {write_report(config.run_dir)}")


def demo(config: RunConfig, runtime: Runtime, choice: Choice) -> None:
    """Pre-trains, fine-tunes and trains from scratch, skipping what is done; compares and reports."""
    wanted: tuple[Stage, ...] = ("pretrain", "finetune", "scratch")
    for stage in wanted:
        if runtime.broadcast(stages.is_done(config, stage)):
            logger.info("%s is done already in %s", stage, config.stage_dir(stage))
            continue
        train(stage)(config, runtime, choice)
    if runtime.is_main:
        console = Console()
        console.print(comparison_table(config.run_dir))
        console.print(f"report: {write_report(config.run_dir).resolve()}")


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


def _load_trained(config: RunConfig, runtime: Runtime, choice: Choice) -> Trained:
    stage = choice.stage or _first_trained(config)
    checkpoints = stages.open_checkpoints(config, stage, runtime)
    path = Path(choice.checkpoint) if choice.checkpoint else checkpoints.best() or checkpoints.latest()
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


def write_predictions(predictions: Predictions, directory: Path, runtime: Runtime) -> None:
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


def _show_evaluation(config: RunConfig, trained: Trained, results: dict[str, dict[str, Any]]) -> None:
    write_evaluation(
        config.stage_dir(trained.stage),
        StageResult(
            run=config.name,
            stage=trained.stage,
            checkpoint=str(trained.checkpoint),
            step=trained.step,
            splits=results,
        ),
    )
    Console().print(metrics_table(config.stage_dir(trained.stage)))
    write_report(config.run_dir)
