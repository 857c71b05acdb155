"""Bytes that ranks send each other in a step, from a sharding plan: arithmetic, nothing is measured.

The exchanges are TorchRec's for an EmbeddingBagCollection with pooled output:

* ids: one all-to-all of lengths (int32) and one of values (int64), to the ranks that hold the table;
* forward: an all-to-all of looked-up rows for whole tables and for columns; for tables cut into rows a
  reduce-scatter of partial sums, over all ranks or, in `table_row_wise` and `grid_shard`, within the host
  and then an all-to-all between ranks with the same place on their hosts;
* backward: the same way back, all-gathers in the place of reduce-scatters.

Every exchange is a matrix [W, W]: what rank i sends to rank j in bytes, the diagonal included, which stays
where it is. A reduce-scatter and an all-gather count as if each rank sent to each other directly; a ring
moves as many bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torchrec.distributed.types import ParameterSharding, ShardingPlan

from hetegen_rec.config.plan import World
from hetegen_rec.config.run import CommunicationPrecision

Matrix: TypeAlias = NDArray[np.float64]

ID_BYTES, LENGTH_BYTES = 8, 4
WEIGHT_BYTES = 4
BYTES_SENT: dict[CommunicationPrecision, float] = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 40 / 32}
"""Bytes on the wire per number. FBGEMM sends int8 in rows of 32 with a scale and an offset in fp32."""


@dataclass(frozen=True)
class TableLoad:
    """A table, and what one row of the data asks of it."""

    name: str
    rows: int
    dim: int
    num_keys: int
    """Bags per row of the data: one looked-up vector each."""
    ids: float
    """Ids per row of the data, over all its bags."""


@dataclass(frozen=True)
class Block:
    """Some columns of a table: on one rank, or cut into rows over several."""

    load: TableLoad
    sharding: str
    kernel: str
    columns: int
    ranks: tuple[int, ...]
    shares: tuple[float, ...]
    """Of the table's rows, by rank; ids are taken to be spread as evenly."""

    @property
    def is_whole(self) -> bool:
        """Whether one rank holds all rows."""
        return len(self.ranks) == 1


@dataclass(frozen=True)
class Exchange:
    """Bytes of one step between ranks, [W, W] each."""

    ids: Matrix
    forward: Matrix
    backward: Matrix


def blocks_of(plan: ShardingPlan, loads: Sequence[TableLoad]) -> list[Block]:
    """The blocks of all tables that are not replicated."""
    placed = _placed(plan)
    return [block for load in loads for block in _blocks_of(load, placed[load.name])]


def replicated(plan: ShardingPlan, loads: Sequence[TableLoad]) -> list[TableLoad]:
    """The `data_parallel` tables, of which every rank has a copy."""
    placed = _placed(plan)
    return [load for load in loads if placed[load.name].sharding_type == "data_parallel"]


def exchange(
    blocks: Sequence[Block],
    world: World,
    rows: int,
    forward: CommunicationPrecision = "fp32",
    backward: CommunicationPrecision = "fp32",
) -> Exchange:
    """What the ranks send each other for the tables in one step.

    Args:
        blocks: of all tables.
        world: the ranks.
        rows: rows of the data on each rank.
        forward: precision of the looked-up rows.
        backward: precision of their gradients.
    """
    shape = (world.size, world.size)
    ids, vectors = np.zeros(shape), np.zeros(shape)
    for block in blocks:
        load = block.load
        for rank, share in zip(block.ranks, block.shares, strict=True):
            ids[:, rank] += rows * (load.num_keys * LENGTH_BYTES + load.ids * share * ID_BYTES)
        _add_vectors(vectors, block, world, rows * load.num_keys * block.columns)
    return Exchange(ids, vectors * BYTES_SENT[forward], vectors.T * BYTES_SENT[backward])


def sent_by_rank(matrix: Matrix, world: World) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bytes [W] that leave each rank for others on its host, and for other hosts."""
    host = np.arange(world.size) // world.local_size
    same = host[:, None] == host[None, :]
    own = np.eye(world.size, dtype=bool)
    return np.where(same & ~own, matrix, 0.0).sum(1), np.where(same, 0.0, matrix).sum(1)


def busiest(matrix: Matrix, world: World) -> tuple[float, float]:
    """Bytes on the busiest link within a host and between hosts; links carry both directions at once."""
    sent, received = sent_by_rank(matrix, world), sent_by_rank(matrix.T, world)
    return (
        float(max(sent[0].max(), received[0].max())),
        float(max(sent[1].max(), received[1].max())),
    )


def all_reduce_by_rank(num_bytes: float, world: World) -> tuple[float, float]:
    """Bytes that each rank sends in an all-reduce, within its host and between hosts.

    A ring sends every byte 2 (W - 1) / W times (Patarasuk and Yuan, 2009). With a network port per rank,
    NCCL runs as many rings, each of which leaves a host once, so of that the L-th part crosses hosts.
    """
    total = 2 * (world.size - 1) / world.size * num_bytes
    if world.num_hosts == 1:
        return total, 0.0
    return total * (world.local_size - 1) / world.local_size, total / world.local_size


def _placed(plan: ShardingPlan) -> Mapping[str, ParameterSharding]:
    return {name: sharding for module in plan.plan.values() for name, sharding in module.items()}


def _blocks_of(load: TableLoad, placed: ParameterSharding) -> Iterator[Block]:
    if placed.sharding_spec is None:  # replicated
        return
    by_column: dict[int, list[tuple[int, int, int]]] = {}
    for shard in placed.sharding_spec.shards:
        rank = shard.placement.rank()
        by_column.setdefault(shard.shard_offsets[1], []).append((rank, *shard.shard_sizes))
    for shards in by_column.values():
        yield Block(
            load,
            placed.sharding_type,
            placed.compute_kernel,
            columns=shards[0][2],
            ranks=tuple(rank for rank, _, _ in shards),
            shares=tuple(rows / load.rows for _, rows, _ in shards),
        )


def _add_vectors(vectors: Matrix, block: Block, world: World, numbers: float) -> None:
    """Adds what a block sends forward: `numbers` for the rows of each rank."""
    if block.is_whole or block.sharding == "row_wise":
        for rank in block.ranks:
            vectors[rank] += numbers
        return
    for rank in block.ranks:
        for other in block.ranks:
            vectors[rank, other] += numbers * world.num_hosts
        peers = [p for p in range(world.size) if p % world.local_size == rank % world.local_size]
        for peer in peers:
            if peer != rank:
                vectors[rank, peer] += numbers
