"""What a run goes through: its data, then stages of training, each in a directory of its own."""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hetegen_rec import terminal
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.loading import load_config, save_config
from hetegen_rec.config.run import RunConfig, Stage
from hetegen_rec.data.prepare import prepare
from hetegen_rec.data.row_plan import lanes_of
from hetegen_rec.data.sources import fetch_source
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.distributed.optimizers import make_optimizer
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.training.checkpoint import Checkpoints, schema_fingerprint
from hetegen_rec.training.logs import RunLog
from hetegen_rec.training.progress import RowsProgress
from hetegen_rec.training.setup import build_sharded, open_split, plan_table
from hetegen_rec.training.trainer import Trainer

logger = logging.getLogger(__name__)

DONE = "done.json"
CHECKPOINTS = "checkpoints"


def prepare_data(config: RunConfig, runtime: Runtime) -> Statistics:
    """Brings a built-in data set if the run names one, and encodes whatever is not encoded yet."""
    with runtime.together("fetching the data set"):
        if config.data.source and runtime.is_main:
            fetch_source(config.data.source, str(config.data.raw_dir))
    with RowsProgress(enabled=runtime.is_main) as progress:
        return prepare(config, runtime, progress)


def run_stage(config: RunConfig, stage: Stage, runtime: Runtime) -> None:
    """Trains one stage from the start; what an earlier attempt left in its directory is replaced."""
    started = time.monotonic()
    with open_trainer(config, stage, runtime) as trainer:
        trainer.run()
    if runtime.is_main:
        done = {"steps": trainer.step, "seconds": round(time.monotonic() - started, 1)}
        (config.stage_dir(stage) / DONE).write_text(json.dumps(done), encoding="utf-8")


@contextmanager
def open_trainer(config: RunConfig, stage: Stage, runtime: Runtime) -> Iterator[Trainer]:
    """Context with the trainer of one stage before its first step. A collective.

    `finetune` starts from the newest checkpoint of `pretrain`, all parameters transferred. An earlier
    attempt is removed last, so it stays where anything is found wrong before the first step.

    Raises:
        ConfigError, DataError, PlanningError, CheckpointError: on every rank, before anything is written
            to the stage's directory.
    """
    with runtime.together("checking the batch sizes"):
        _check_batch(config, runtime)
    statistics = prepare_data(config, runtime)
    model = build_sharded(config, stage, statistics, runtime)
    if stage == "finetune":
        pretraining = open_checkpoints(config, "pretrain", statistics, runtime)
        pretraining.load(_newest(config, pretraining), model.dmp)
    optimizer = make_optimizer(
        model.dmp,
        config.stage(stage),
        config.train.table_optimizer,
        config.model.balance.learning_rate,
    )
    readers = (
        open_split(config, "train", statistics, runtime, stage=stage),
        open_split(config, "valid", statistics, runtime),
    )
    if runtime.is_main:
        terminal.results().print(plan_table(model.plan))
    directory = config.stage_dir(stage)
    with runtime.together(f"clearing {directory}"):
        if runtime.is_main:
            _clear(directory)
            save_config(config, directory / "config.yaml")
    checkpoints = open_checkpoints(config, stage, statistics, runtime)
    with RunLog(directory, enabled=runtime.is_main, tensorboard=config.train.tensorboard) as log:
        yield Trainer(config, stage, model, optimizer, statistics, readers, checkpoints, log, runtime)


def is_done(config: RunConfig, stage: Stage) -> bool:
    """Whether a stage was finished under exactly this configuration."""
    directory = config.stage_dir(stage)
    if not (directory / DONE).exists():
        return False
    try:
        return load_config(directory / "config.yaml") == config
    except ConfigError:
        return False


def open_checkpoints(
    config: RunConfig, stage: Stage, statistics: Statistics, runtime: Runtime
) -> Checkpoints:
    """The checkpoints of one stage of a run, which fit its schema and its prepared data only."""
    return Checkpoints(
        config.stage_dir(stage) / CHECKPOINTS,
        runtime,
        config.checkpoints.keep,
        f"{schema_fingerprint(config.features)}-{statistics.fingerprint[:16]}",
    )


def _newest(config: RunConfig, pretraining: Checkpoints) -> Path:
    path = pretraining.latest()
    if path is None:
        raise ConfigError(
            f"finetune starts from a pre-trained model, but {config.stage_dir('pretrain')} holds no "
            "checkpoint; run `pretrain` with the same config first, or train from scratch (`scratch`)"
        )
    return path


def _check_batch(config: RunConfig, runtime: Runtime) -> None:
    lanes = config.data.lanes or runtime.world_size
    lanes_of(runtime.rank, runtime.world_size, lanes)
    rows = config.train.batch_size
    if rows % lanes:
        raise ConfigError(
            f"train.batch_size: {rows} rows a step cannot be shared equally by {lanes} ranks or lanes; "
            f"use a multiple of {lanes}, such as {-(-rows // lanes) * lanes}"
        )


def _clear(directory: Path) -> None:
    if directory.exists():
        logger.info("replacing the earlier attempt in %s", directory)
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
