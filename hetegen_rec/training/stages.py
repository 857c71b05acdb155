"""What a run goes through: its data, then stages of training, each in a directory of its own."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torchrec.optim.keyed import KeyedOptimizer

from hetegen_rec import terminal
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.run import RunConfig, Stage
from hetegen_rec.data.prepare import prepare
from hetegen_rec.data.reader import Reader
from hetegen_rec.data.row_plan import lanes_of
from hetegen_rec.data.sources import fetch_source
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.distributed.signals import StopRequest
from hetegen_rec.distributed.watchdog import Watchdog
from hetegen_rec.evaluation.capacity import plan_table
from hetegen_rec.models.hetegen import HeteGenNetwork
from hetegen_rec.models.reconstruction import check_growth
from hetegen_rec.training.attempts import (
    begin_attempt,
    check_attempt,
    check_changes,
    clear_attempt,
    earlier_checkpoints_dir,
    end_attempt,
    is_done,
    is_finished,
    is_of_job,
    knows_configuration,
)
from hetegen_rec.training.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    Checkpoints,
    full_schema_fingerprint,
)
from hetegen_rec.training.checkpoint_writer import CheckpointWriter
from hetegen_rec.training.logs import RunLog
from hetegen_rec.training.progress import RowsProgress
from hetegen_rec.training.setup import ShardedModel, build_sharded, open_split, optimizer_of, rows_per_step
from hetegen_rec.training.state import StageState
from hetegen_rec.training.trainer import Trainer

logger = logging.getLogger(__name__)


def prepare_data(config: RunConfig, runtime: Runtime) -> Statistics:
    """Brings a built-in data set if the run names one, and encodes whatever is not encoded yet."""
    fetch_data(config, runtime)
    with RowsProgress(enabled=runtime.is_main) as progress:
        return prepare(config, runtime, progress)


def fetch_data(config: RunConfig, runtime: Runtime) -> None:
    """Brings a built-in data set if the run names one. A collective."""
    with runtime.together("fetching the data set"):
        if config.data.source and runtime.is_main:
            fetch_source(config.data.source, str(config.data.raw_dir))


def run_stage(
    config: RunConfig,
    stage: Stage,
    runtime: Runtime,
    *,
    fresh: bool = False,
    accept_changes: bool = False,
) -> bool:
    """Trains one stage to its end, from where an earlier attempt left it.

    Args:
        config: the run.
        stage: which one.
        runtime: this process's view of the job.
        fresh: start anew and replace what earlier attempts left, also where the stage was finished. A group
            of ranks that the launcher started again goes on all the same.
        accept_changes: go on also where settings differ that say how to train, such as learning rates.

    Returns:
        Whether the job may go on, the stage being finished; it may not where it was asked to stop.
    """
    with runtime.together("reading what is there already"):
        # Restarts of a fixed number of hosts are counted; hosts that came or went show by the job's name.
        fresh = fresh and not runtime.restart_count and not is_of_job(config, stage, runtime.job_id)
        done = runtime.is_main and not fresh and is_done(config, stage)
    fresh, done = runtime.broadcast((fresh, done))
    if done:
        logger.info("%s is done already in %s", stage, config.stage_dir(stage))
        return True
    with open_trainer(config, stage, runtime, fresh=fresh, accept_changes=accept_changes) as trainer:
        finished = trainer.run()
    with runtime.together("finishing the stage"):
        if finished and runtime.is_main:
            end_attempt(config, stage, trainer.state)
    # A request that comes behind the last step stops what would follow.
    stopped = not finished or any(runtime.gather(trainer.stop.requested is not None))
    if stopped and runtime.is_main:
        terminal.results().print(
            f"stopped by {trainer.stop.requested or 'a signal to another rank'} after step "
            f"{trainer.state.step} of {trainer.total_steps}, saved; the same command goes on from there"
        )
    return not stopped


@contextmanager
def open_trainer(
    config: RunConfig,
    stage: Stage,
    runtime: Runtime,
    *,
    fresh: bool = False,
    accept_changes: bool = False,
) -> Iterator[Trainer]:
    """Context with the trainer of one stage before its first step of this attempt. A collective.

    It goes on from the newest intact checkpoint of the stage. Without one, `finetune` starts from the
    newest checkpoint of `pretrain`, all parameters transferred, and the others from nothing, unless the
    configuration names a checkpoint to start from. An earlier attempt that is to be replaced is removed
    last, so it stays where anything is found wrong before the first step.

    Raises:
        ConfigError, DataError, PlanningError, CheckpointError: on every rank, before anything is written
            to the stage's directory.
    """
    with runtime.together("checking the configuration"):
        _check_batch(config, runtime)
        if runtime.is_main and not fresh:
            check_attempt(config, stage, accept_changes=accept_changes)
    statistics = prepare_data(config, runtime)
    model = build_sharded(config, stage, statistics, runtime)
    optimizer = optimizer_of(config, stage, model)
    readers = (
        open_split(config, "train", statistics, runtime, stage=stage, train=True),
        open_split(config, "valid", statistics, runtime, stage=stage),
    )
    checkpoints = open_checkpoints(config, stage, statistics, runtime)
    newest = None if fresh else checkpoints.latest()
    if newest is not None:
        _check_configuration(config, stage, newest, accept_changes=accept_changes)
        load_checkpoint(config, checkpoints, newest, statistics, model, optimizer)
        state = _state_of(newest, statistics, readers[0])
        _check_budget(config, stage, state)
        logger.info("%s goes on from %s", stage, newest.location)
    else:
        if not fresh:
            _check_place(config, stage, checkpoints, runtime)
        _load_start(config, stage, model, optimizer, statistics, runtime)
        state = StageState()
    if runtime.is_main:
        terminal.results().print(plan_table(model.plan, "Sharding plan"))
    directory = config.stage_dir(stage)
    with runtime.together(f"opening {directory}"):
        if runtime.is_main:
            if newest is None:
                clear_attempt(config, stage, checkpoints.clear)
            begin_attempt(config, stage, runtime.job_id)
    stop = StopRequest()
    stacks = directory / "stacks" / f"rank-{runtime.rank}.txt"
    watchdog = Watchdog(config.distributed.timeout_seconds, runtime.rank, stacks, stop)
    with (
        stop,
        _open_writer(config, checkpoints, runtime) as writer,
        _open_log(config, stage, state, runtime) as log,
    ):
        writer.reserve(model.dmp, optimizer)
        yield Trainer(
            config, stage, model, optimizer, statistics, readers, state, writer, log, stop, watchdog, runtime
        )


def _open_writer(config: RunConfig, checkpoints: Checkpoints, runtime: Runtime) -> CheckpointWriter:
    kept = config.checkpoints
    return CheckpointWriter(
        checkpoints, runtime, keep=kept.keep, failed_writes_allowed=kept.failed_writes_allowed
    )


def _open_log(config: RunConfig, stage: Stage, state: StageState, runtime: Runtime) -> RunLog:
    return RunLog(
        config.stage_dir(stage),
        state.step,
        is_evaluated=not state.evaluation_due,
        enabled=runtime.is_main,
        tensorboard=config.train.tensorboard,
    )


def open_checkpoints(
    config: RunConfig, stage: Stage, statistics: Statistics, runtime: Runtime
) -> Checkpoints:
    """The checkpoints of one stage of a run, which fit its schema and its prepared data only."""
    return Checkpoints(
        config.checkpoints_dir(stage),
        runtime,
        full_schema_fingerprint(config.features),
        statistics.table_identities,
    )


def load_checkpoint(
    config: RunConfig,
    checkpoints: Checkpoints,
    info: CheckpointInfo,
    statistics: Statistics,
    model: ShardedModel,
    optimizer: KeyedOptimizer | None = None,
) -> None:
    """Loads a checkpoint, whose tables may have grown since.

    A model that reconstructs cannot take a table for which its field would need another head. What scores
    clicks may be another than in pre-training, which has not trained it.

    Raises:
        CheckpointError, ConfigError: it does not fit; see `Checkpoints.load`.
    """
    network = model.network
    unread = network.unread
    if isinstance(network, HeteGenNetwork) and not unread:
        rows = {field.name: statistics.table_rows(field.name) for field in config.features.table_owners}
        check_growth(config.features, {**rows, **checkpoints.grown_tables(info)}, rows, config.model)
    if info.metadata["stage"] == "pretrain":
        unread = (*unread, *network.scorers)
    checkpoints.load(info, model.dmp, optimizer, [f"network.{name}." for name in unread])


def _state_of(newest: CheckpointInfo, statistics: Statistics, reader: Reader) -> StageState:
    """Where the stage stood, if the training rows are the same still."""
    there = newest.metadata["rows"]["train"]
    here = {"source": statistics.fingerprint, "num_rows": reader.num_rows}
    if there != here:
        raise CheckpointError(
            f"{newest.location}: written in the middle of {there['num_rows']:,} training rows, but the "
            f"prepared data are others ({reader.num_rows:,} rows). To "
            "train on newer data use another run_dir, and `start_from` in the stage's section"
        )
    return StageState.from_json(newest.metadata["state"])


def _load_start(
    config: RunConfig,
    stage: Stage,
    model: ShardedModel,
    optimizer: KeyedOptimizer,
    statistics: Statistics,
    runtime: Runtime,
) -> None:
    """Loads what a stage starts from, if it does not start from nothing."""
    named = config.stage(stage).start_from
    if named is None and stage != "finetune":
        return
    if named is None:
        checkpoints = open_checkpoints(config, "pretrain", statistics, runtime)
        info = _newest(checkpoints)
        if runtime.is_main and not is_finished(config, "pretrain"):
            logger.warning(
                "pretrain was not finished; finetune starts from its newest checkpoint all the same"
            )
    else:
        checkpoints = open_checkpoints(config, stage, statistics, runtime)
        info = checkpoints.check(named)
    continues = info.metadata["stage"] == stage
    load_checkpoint(config, checkpoints, info, statistics, model, optimizer if continues else None)
    logger.info("%s starts from the weights%s of %s", stage, " and optimizers" * continues, info.location)


def _newest(pretraining: Checkpoints) -> CheckpointInfo:
    newest = pretraining.latest()
    if newest is None:
        raise ConfigError(
            f"finetune starts from a pre-trained model, but {pretraining.store.location} holds no "
            "checkpoint; run `pretrain` with the same config first, or train from scratch (`scratch`)"
        )
    return newest


def _check_configuration(
    config: RunConfig, stage: Stage, newest: CheckpointInfo, *, accept_changes: bool
) -> None:
    """Refuses to go on under another configuration, where only the checkpoint tells of the earlier one."""
    if not knows_configuration(config, stage):  # the run directory was lost; the checkpoints lie elsewhere
        earlier = RunConfig.model_validate(newest.metadata["config"])
        check_changes(earlier, config, stage, newest.location, accept_changes=accept_changes)


def _check_place(config: RunConfig, stage: Stage, empty: Checkpoints, runtime: Runtime) -> None:
    """Refuses to train anew, and so to remove an earlier attempt, whose checkpoints lie elsewhere."""
    with runtime.together("looking for earlier checkpoints"):
        place = earlier_checkpoints_dir(config, stage) if runtime.is_main else None
    place = runtime.broadcast(place)
    newest = None if place is None else Checkpoints(place, runtime, empty.fingerprint).latest()
    if newest is not None:
        raise ConfigError(
            f"{newest.location} is the newest checkpoint of this stage, but `checkpoints.directory: "
            f"{config.checkpoints.directory}` makes it look in {empty.store.location}, where there is none. "
            "Restore the key, move the checkpoints there, or replace the earlier stage with --fresh"
        )


def _check_budget(config: RunConfig, stage: Stage, state: StageState) -> None:
    """Refuses a budget that ends before what is trained.

    Steps count for `train.max_steps` only: a stage that changed its number of ranks takes more to an epoch.
    """
    epochs, steps = config.stage(stage).epochs, config.train.max_steps
    if state.cursor.epoch >= epochs or (steps is not None and state.step > steps):
        raise ConfigError(
            f"{config.stage_dir(stage)} holds {state.step} trained steps, the last of them in epoch "
            f"{state.cursor.epoch + 1}, but the budget ends before (`stages.{stage}.epochs`: {epochs}, "
            f"`train.max_steps`: {steps}); raise it, set another `run_dir`, or replace the earlier stage "
            "with --fresh"
        )


def _check_batch(config: RunConfig, runtime: Runtime) -> None:
    lanes = config.data.lanes or runtime.world_size
    lanes_of(runtime.rank, runtime.world_size, lanes)
    wanted, rows = config.train.batch_size, rows_per_step(config, runtime)
    if rows == 0:
        raise ConfigError(
            f"train.batch_size: {wanted} rows a step are too few for {lanes} ranks or lanes; use a multiple "
            f"of {lanes}"
        )
    if rows != wanted and runtime.is_main:
        logger.warning(
            "train.batch_size: %d rows cannot be shared equally by %d ranks; steps have %d rows",
            wanted,
            lanes,
            rows,
        )
