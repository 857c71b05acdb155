"""From a configuration to a sharded model and its readers: what training and scoring share."""

import gc
import glob
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.keyed import KeyedOptimizer

from hetegen_rec.config.data import Split
from hetegen_rec.config.run import Frequency, RunConfig, Stage, TrainConfig
from hetegen_rec.data.batching import Batcher
from hetegen_rec.data.encoding import Encoder
from hetegen_rec.data.raw import list_row_groups
from hetegen_rec.data.reader import Reader, open_reader
from hetegen_rec.data.staleness import Staleness
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.distributed.optimizers import attach_table_optimizer, make_optimizer
from hetegen_rec.distributed.planning import PlannedTable, agree_on_plan, plan_summary
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.distributed.sharding import init_tables, move_tables_to_huge_pages, shard_model
from hetegen_rec.models.hetegen import HeteGen, build_model
from hetegen_rec.models.network import ClickNetwork

logger = logging.getLogger(__name__)


@dataclass
class ShardedModel:
    """A model spread over the ranks."""

    dmp: DistributedModelParallel
    network: ClickNetwork
    """The replicated part; the same object that `dmp` wraps."""
    plan: list[PlannedTable]


def model_of(config: RunConfig, stage: Stage, statistics: Statistics) -> HeteGen:
    """The model of a stage, its tables not yet anywhere; see `build_model`."""
    of_stage = config.stage(stage)
    return build_model(config.features, statistics, config.model, config.train, stage, of_stage, config.seed)


def optimizer_of(config: RunConfig, stage: Stage, model: ShardedModel) -> KeyedOptimizer:
    """The optimizer of everything that a stage trains; see `make_optimizer`."""
    difficulty_lr = config.model.balance.learning_rate
    return make_optimizer(model.dmp, config.stage(stage), config.train.table_optimizer, difficulty_lr)


def build_sharded(
    config: RunConfig,
    stage: Stage,
    statistics: Statistics,
    runtime: Runtime,
    plan: ShardingPlan | None = None,
) -> ShardedModel:
    """Builds, plans and shards the model of a stage. A collective.

    Args:
        config: the run.
        stage: which one.
        statistics: sizes of the tables, among others.
        runtime: this process's view of the job.
        plan: one that was made before; default: the ranks agree on one.
    """
    gc.collect()  # TorchRec's pipeline leaves an earlier model in a cycle, with all of its tables
    model = model_of(config, stage, statistics)
    attach_table_optimizer(
        model.ebc,
        config.train.table_optimizer,
        config.stage(stage),
        runtime.device.type,
    )
    if plan is None:
        rows_per_rank = rows_per_step(config, runtime) // runtime.world_size
        plan = agree_on_plan(runtime, model, config.distributed, rows_per_rank)
    planned = plan_summary(plan, model)
    network = model.network.to(runtime.device)
    dmp = shard_model(model, plan, runtime, config.distributed)
    move_tables_to_huge_pages(dmp)
    init_tables(dmp, config.seed, config.model.init_std)
    # Sharding draws random numbers too; dropout must not depend on the plan, and must differ by rank.
    torch.manual_seed(config.seed + runtime.rank)
    return ShardedModel(dmp, network, planned)


def make_pipeline(
    dmp: DistributedModelParallel, optimizer: KeyedOptimizer, config: TrainConfig, device: torch.device
) -> TrainPipelineBase | TrainPipelineSparseDist:
    """What takes the steps."""
    kind = TrainPipelineSparseDist if config.pipeline == "sparse_dist" else TrainPipelineBase
    return kind(dmp, optimizer, device)


def rows_per_step(config: RunConfig, runtime: Runtime) -> int:
    """Rows of a training step over all ranks: the batch size, or what of it the lanes can share equally.

    So a job that goes on with fewer hosts than it began with is not ended by its batch size.
    """
    lanes = config.data.lanes or runtime.world_size
    return config.train.batch_size // lanes * lanes


def open_split(
    config: RunConfig,
    split: Split,
    statistics: Statistics,
    runtime: Runtime,
    *,
    stage: Stage,
    train: bool = False,
) -> Reader:
    """The reader of one split.

    Args:
        config: the run.
        split: which rows.
        statistics: of the training rows.
        runtime: this process's view of the job.
        stage: whose model reads them; how often its training saw each id depends on its dropout.
        train: whether it trains on the rows, shuffled, or scores each of them once.
    """
    encoder = None
    if config.data.encode == "on_the_fly":
        encoder = Encoder.load(config.data.prepared_dir, config.features)
    return open_reader(
        config,
        split,
        statistics,
        rank=runtime.rank,
        world_size=runtime.world_size,
        batch_size=rows_per_step(config, runtime) if train else config.train.eval_batch_size,
        train=train,
        seed=config.seed,
        oov_dropout=config.stage(stage).oov_dropout,
        movement=_movement(config, stage, statistics) if train else None,
        frequencies=config.frequencies(stage) if train else get_args(Frequency),
        encoder=encoder,
        device=runtime.device,
    )


def _movement(
    config: RunConfig, stage: Stage, statistics: Statistics
) -> dict[str, NDArray[np.float32]] | None:
    """By table, how much of its movement the row of each id keeps; None where no id is held."""
    held = config.stage(stage).stale_ids
    if held is None:
        return None
    return Staleness.load(held.directory).factors(statistics, held.regularisation)


def open_encoded(
    config: RunConfig, directory: Path, statistics: Statistics, runtime: Runtime, *, stage: Stage
) -> Reader:
    """The reader of encoded rows from outside the prepared data, of which a stage scores every one once."""
    batcher = Batcher(config.features, statistics, config.stage(stage).oov_dropout, drop_ids=False)
    ranks = runtime.world_size
    return Reader(
        list_row_groups([f"{glob.escape(str(directory))}/*.parquet"]),
        batcher,
        rank=runtime.rank,
        world_size=ranks,
        batch_size=-(-config.train.eval_batch_size // ranks) * ranks,
        num_lanes=ranks,
        seed=config.seed,
        shuffle=False,
        shuffle_rows=config.data.shuffle_rows,
        prefetch_batches=config.data.prefetch_batches,
        columns=batcher.encoded_schema.names,
        device=runtime.device,
    )
