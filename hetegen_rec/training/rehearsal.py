"""`hetegen plan --rehearse`: a plan's wiring run without its devices, on gloo ranks of this machine.

The network, the kinds of sharding and the ranks of every shard are those of the plan; tables are smaller.
What is run is what training runs: the same model, sharding, optimizers, guard and pipeline, on random rows.
"""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingPlan

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.plan import World
from hetegen_rec.config.run import CommunicationPrecision, RunConfig, Stage
from hetegen_rec.config.schema import NUM_RESERVED_IDS
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.batching import Batcher
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.expected import sized_statistics
from hetegen_rec.data.random_rows import random_rows
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.distributed.counting import CountedCalls
from hetegen_rec.distributed.local_ranks import run_on_local_ranks
from hetegen_rec.distributed.optimizers import ON_CPU
from hetegen_rec.distributed.planning import PlannedTable
from hetegen_rec.distributed.runtime import DistributedError, Runtime, start_runtime
from hetegen_rec.distributed.scaled import CarriedTable, carry_over, row_blocks, scaled_rows
from hetegen_rec.distributed.sharding import TableSharder, initial_vectors, local_parts, table_weights
from hetegen_rec.distributed.traffic import Matrix, blocks_of, busiest, exchange
from hetegen_rec.evaluation.rehearsal import LinkComparison, Rehearsal, RehearsedTable
from hetegen_rec.models.embedding import table_shapes
from hetegen_rec.models.network import Outputs
from hetegen_rec.training.capacity import CapacityPlan, table_loads
from hetegen_rec.training.guard import NumericalGuard
from hetegen_rec.training.setup import ShardedModel, build_sharded, make_pipeline, optimizer_of

logger = logging.getLogger(__name__)

_STEPS = 2
_ROWS = 8  # a rank and step
_RANK_BYTES = 300e6  # of a rank besides tables: network, rows, and what of torch it does not share
_TABLE_OPTIMIZER = "rowwise_adagrad"  # where CPU kernels lack the configured one
_RELATIVE_ERROR: dict[CommunicationPrecision, float] = {
    "fp32": 1e-6,
    "fp16": 2e-3,
    "bf16": 2e-3,
    "int8": 2e-2,
}
"""Of looked-up numbers, relative to the largest, by the precision in which they travel; bf16 is fp16 here."""


@dataclass(frozen=True)
class _Order:
    """What every rank is told."""

    config: RunConfig
    stage: Stage
    num_values: dict[str, int]
    """By table, the reserved ids left out."""
    plan: ShardingPlan


@dataclass(frozen=True)
class _Seen:
    """What one rank saw."""

    losses: list[float]
    field_losses: list[list[float]]
    """By step; nothing where no field is reconstructed."""
    weights: str
    """Digest of the network's weights and buffers after the steps."""
    shards: dict[str, int]
    """How many of each table are here."""
    ids: list[float]
    """[W] bytes handed to each rank in all steps, as `vectors`."""
    vectors: list[float]
    lookup_errors: dict[str, float]
    largest: float
    """Absolute value of a looked-up number."""


def check_rehearsal(factor: int) -> None:
    """Refuses what cannot be rehearsed, before anything is planned.

    Raises:
        ConfigError: the message says what to do.
    """
    if factor < 1:
        raise ConfigError(
            f"--rehearse: {factor} is not what rows of tables can be divided by; take 1 for tables as large "
            "as planned, or more, such as 1000"
        )


def rehearse(config: RunConfig, planned: CapacityPlan, factor: int) -> Rehearsal:
    """Trains a few steps of a planned stage on as many local processes as it was planned for.

    Args:
        config: the run.
        planned: its plan.
        factor: what the rows of tables are divided by. Those of a table that has more rows than
            `full_softmax_max` stay above it, so that every field keeps its kind of head.

    Raises:
        ConfigError: the ranks would not fit into this machine's memory.
        DistributedError: a rank failed.
    """
    check_rehearsal(factor)
    start = time.monotonic()
    world, schema = config.plan.parsed_world, config.features
    least = config.model.reconstruction.full_softmax_max + 1 + NUM_RESERVED_IDS
    blocks = row_blocks(planned.sharding)
    lines = planned.report.plan
    rows = {line.table: scaled_rows(line.rows, factor, least, blocks[line.table]) for line in lines}
    num_values = {name: count - NUM_RESERVED_IDS for name, count in rows.items()}
    statistics = sized_statistics(schema, num_values)
    _check_memory(config, statistics, world, factor)
    plan, carried = carry_over(planned.sharding, rows, TableSharder())
    here, replaced = _for_cpus(config, world.size * _ROWS)
    logger.info("rehearsing on %d ranks of this machine", world.size)
    seen = run_on_local_ranks(world, _train, _Order(here, planned.stage, num_values, plan))
    return Rehearsal(
        run=config.name,
        stage=planned.stage,
        world=config.plan.world,
        factor=factor,
        least_rows=least,
        batch_size=here.train.batch_size,
        tables=[_table(line, rows, carried, seen) for line in lines],
        losses=[[one.losses[step] for one in seen] for step in range(_STEPS)],
        differing=_differing(seen),
        lookup_errors={name: max(one.lookup_errors[name] for one in seen) for name in rows},
        lookup_tolerance=_RELATIVE_ERROR[config.distributed.forward_precision]
        * max(one.largest for one in seen),
        traffic=_compare_traffic(config, plan, statistics, seen),
        replaced=replaced,
        seconds=time.monotonic() - start,
    )


def _check_memory(config: RunConfig, statistics: Statistics, world: World, factor: int) -> None:
    shapes = table_shapes(config.features, statistics, config.model.dim)
    needed = world.size * _RANK_BYTES + sum(4.0 * shape.num_rows * (shape.dim + 1) for shape in shapes)
    available = psutil.virtual_memory().available
    if needed > available:
        raise ConfigError(
            f"--rehearse: {factor}: {world.size} ranks with their tables need about {needed / 1e9:.1f} GB, "
            f"but {available / 1e9:.1f} GB are free here; divide by more, or rehearse a smaller plan.world"
        )


def _for_cpus(config: RunConfig, batch_size: int) -> tuple[RunConfig, list[str]]:
    """The run as CPUs can train it, and what they do otherwise."""
    changes: dict[str, Any] = {"batch_size": batch_size}
    replaced = []
    if config.train.table_optimizer not in ON_CPU:
        changes["table_optimizer"] = _TABLE_OPTIMIZER
        replaced.append(
            f"table optimizer {config.train.table_optimizer} has no CPU kernel, run with {_TABLE_OPTIMIZER}"
        )
    wires = ("forward_precision", "backward_precision")
    halves = {wire: "fp16" for wire in wires if getattr(config.distributed, wire) == "bf16"}
    if halves:
        replaced.append("gloo has no bf16, what was to travel in it travelled in fp16")
    sections = {
        "train": config.train.model_copy(update=changes),
        "distributed": config.distributed.model_copy(update=halves),
    }
    return config.model_copy(update=sections), replaced


def _train(order: _Order) -> _Seen:
    """What one rank does."""
    config, schema = order.config, order.config.features
    statistics = sized_statistics(schema, order.num_values)
    with start_runtime("cpu", config.distributed.timeout_seconds) as runtime:
        model = build_sharded(config, order.stage, statistics, runtime, order.plan)
        batches = [_batch(config, statistics, runtime, step) for step in range(_STEPS)]
        errors, largest = _lookup_errors(config, model, batches[0])
        optimizer, train = optimizer_of(config, order.stage, model), config.train
        guard = NumericalGuard(model.network, schema, train, runtime)
        model.dmp.train()
        pipeline = make_pipeline(model.dmp, guard.gated(optimizer), train, runtime.device)
        calls, outputs, source = CountedCalls(runtime.world_size), [], iter(batches)
        with calls.counted():
            for step in range(_STEPS):
                outputs.append(pipeline.progress(source))
                guard.end_step(step)
        guard.report()
        if isinstance(pipeline, TrainPipelineSparseDist) and not pipeline._pipelined_modules:
            raise DistributedError("the pipeline exchanges no ids ahead: it found no sharded tables")
        return _Seen(
            losses=[_loss(one) for one in outputs],
            field_losses=[_field_losses(one) for one in outputs],
            weights=_digest(model.network),
            shards=_count_shards(model),
            ids=calls.ids.tolist(),
            vectors=calls.sum_of_vectors.tolist(),
            lookup_errors=errors,
            largest=largest,
        )


def _batch(config: RunConfig, statistics: Statistics, runtime: Runtime, step: int) -> Batch:
    """This rank's rows of a step."""
    first = _ROWS * runtime.rank
    total = _ROWS * runtime.world_size
    rng = np.random.default_rng((config.seed, step, runtime.rank))
    rows = random_rows(config.features, statistics, _ROWS, step * total + first, rng)
    strata = ((np.arange(first, first + _ROWS) + 0.5) / total).astype(np.float32)
    return Batcher(config.features, statistics).make(rows, strata, config.seed, Cursor(), total)


@torch.no_grad()
def _lookup_errors(config: RunConfig, model: ShardedModel, batch: Batch) -> tuple[dict[str, float], float]:
    """How far looked-up numbers are off what their table was filled with, by table; the largest number.

    A collective, before the first step.
    """
    (tables,) = (m for m in model.dmp.modules() if isinstance(m, ShardedEmbeddingBagCollection))
    looked_up = tables(batch.kjt).to_dict()
    bags = batch.kjt.to_dict()
    errors, largest = {owner.name: 0.0 for owner in config.features.table_owners}, 0.0
    for token in config.features.tokens:
        owner = config.features.field(config.features.field(token.field).table_name)
        vectors, bag = looked_up[token.key], bags[token.key]
        rows = initial_vectors(
            owner.name, bag.values(), vectors.shape[1], config.seed, config.model.init_std
        )  # [V, D], as many of every row
        expected = rows.view(batch.num_rows, -1, rows.shape[1])
        pooled = expected.mean(1) if owner.kind == "multi_valued" else expected.sum(1)
        errors[owner.name] = max(errors[owner.name], float((vectors - pooled).abs().max()))
        largest = max(largest, float(pooled.abs().max()))
    return errors, largest


def _loss(outputs: Outputs) -> float:
    return float(torch.stack(list(outputs.terms.values())).sum())


def _field_losses(outputs: Outputs) -> list[float]:
    return [] if outputs.fields is None else outputs.fields.cross_entropy.flatten().tolist()


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for _, values in sorted(network.state_dict().items()):
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _count_shards(model: ShardedModel) -> dict[str, int]:
    return {name: len(local_parts(weights)) for name, weights in table_weights(model.dmp).items()}


def _table(
    line: PlannedTable, rows: Mapping[str, int], carried: Mapping[str, CarriedTable], seen: Sequence[_Seen]
) -> RehearsedTable:
    ranks = tuple(rank for rank, one in enumerate(seen) if one.shards.get(line.table))
    found = carried[line.table]
    return RehearsedTable(line, rows[line.table], found.sharding, found.kernel, ranks, found.not_run)


def _differing(seen: Sequence[_Seen]) -> list[str]:
    found = []
    if len({one.weights for one in seen}) > 1:
        found.append("weights of the network")
    if len({str(one.field_losses) for one in seen}) > 1:
        found.append("losses by field")
    return found


def _compare_traffic(
    config: RunConfig, plan: ShardingPlan, statistics: Statistics, seen: Sequence[_Seen]
) -> dict[str, LinkComparison]:
    world, wires = config.plan.parsed_world, config.distributed
    loads = table_loads(config.features, statistics, config.model.dim)
    sent = exchange(blocks_of(plan, loads), world, _ROWS, wires.forward_precision, wires.backward_precision)

    def compare(predicted: Matrix, counted: Sequence[list[float]]) -> LinkComparison:
        return LinkComparison(busiest(predicted, world), busiest(np.array(counted) / _STEPS, world))

    return {
        "ids": compare(sent.ids, [one.ids for one in seen]),
        "looked-up rows and gradients": compare(sent.forward + sent.backward, [one.vectors for one in seen]),
    }
