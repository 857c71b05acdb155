"""A sharding plan for devices, carried over to smaller tables on CPUs: the same kinds on the same ranks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch.distributed._shard.metadata import ShardMetadata
from torchrec.distributed.types import (
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
)

from hetegen_rec.distributed.sharding import TableSharder

_DEVICE = "cpu"
_FALLBACK = "table_wise"


@dataclass(frozen=True)
class CarriedTable:
    """What became of one table's plan."""

    sharding: str
    kernel: str
    not_run: str | None = None
    """What of the plan does not exist on CPUs, and what is run in its place; None where all of it is run."""


def row_blocks(plan: ShardingPlan) -> dict[str, int]:
    """Into how many blocks of rows each table is cut; 1 where each rank that has any of it has all rows."""
    return {
        name: max((len(shards) for shards in _by_column(sharding).values()), default=1)
        for module in plan.plan.values()
        for name, sharding in module.items()
    }


def scaled_rows(rows: int, factor: int, least: int, blocks: int) -> int:
    """Rows of a table divided by a factor.

    Args:
        rows: of the table.
        factor: what they are divided by.
        least: as many are left, if there are.
        blocks: of rows, each of which must get one.
    """
    wanted = max(math.ceil(rows / factor), least)
    return min(rows, math.ceil(wanted / blocks) * blocks)


def carry_over(
    plan: ShardingPlan, rows: Mapping[str, int], sharder: TableSharder
) -> tuple[ShardingPlan, dict[str, CarriedTable]]:
    """The plan for tables of other sizes on gloo ranks, and by table what could be kept of it.

    Columns are cut where they were, rows into as many equal blocks, and every shard stays on its rank. A
    kernel or a kind of sharding that CPUs lack is replaced by one that they have.

    Args:
        plan: made for any device.
        rows: of every table.
        sharder: says what there is on CPUs.
    """
    modules, carried = {}, {}
    for path, module in plan.plan.items():
        here = EmbeddingModuleShardingPlan()
        for name, sharding in module.items():
            carried[name] = _decide(sharding, sharder)
            here[name] = _carry(sharding, rows[name], carried[name])
        modules[path] = here
    return ShardingPlan(modules), carried


def _decide(planned: ParameterSharding, sharder: TableSharder) -> CarriedTable:
    kind, kernel = planned.sharding_type, planned.compute_kernel
    if kind not in sharder.sharding_types(_DEVICE):
        other = sharder.compute_kernels(_FALLBACK, _DEVICE)[0]
        return CarriedTable(_FALLBACK, other, f"{kind} does not exist on CPUs; run whole on one rank")
    offered = sharder.compute_kernels(kind, _DEVICE)
    if kernel in offered:
        return CarriedTable(kind, kernel)
    return CarriedTable(kind, offered[0], f"kernel {kernel} does not exist on CPUs; run as {offered[0]}")


def _carry(planned: ParameterSharding, rows: int, carried: CarriedTable) -> ParameterSharding:
    shards = [
        ShardMetadata([start, column], [size, columns], f"rank:{rank}/{_DEVICE}")
        for column, blocks in sorted(_by_column(planned).items())
        for (rank, columns), (start, size) in zip(blocks, _cut(rows, len(blocks)), strict=True)
    ]
    if carried.sharding != planned.sharding_type:
        width = sum({shard.shard_offsets[1]: shard.shard_sizes[1] for shard in shards}.values())
        rank = (planned.ranks or [0])[0]
        shards = [ShardMetadata([0, 0], [rows, width], f"rank:{rank}/{_DEVICE}")]
        planned = replace(planned, sharding_type=carried.sharding, ranks=[rank])
    return replace(
        planned,
        compute_kernel=carried.kernel,
        sharding_spec=EnumerableShardingSpec(shards) if shards else None,
        cache_params=None,
    )


def _by_column(planned: ParameterSharding) -> dict[int, list[tuple[int, int]]]:
    """By the first column of a block: rank and columns of its shards, by row. Nothing if it is replicated."""
    found: dict[int, list[tuple[int, int]]] = {}
    if planned.sharding_spec is None:
        return found
    for shard in sorted(planned.sharding_spec.shards, key=lambda one: one.shard_offsets[0]):
        column, columns = shard.shard_offsets[1], shard.shard_sizes[1]
        found.setdefault(column, []).append((shard.placement.rank(), columns))
    return found


def _cut(rows: int, blocks: int) -> list[tuple[int, int]]:
    """Start and size of equal blocks, the last one what is left, as TorchRec cuts."""
    size = math.ceil(rows / blocks)
    return [(block * size, min(size, rows - block * size)) for block in range(blocks)]
