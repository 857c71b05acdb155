"""Which rank holds which part of which table: TorchRec's planner, fed from the machine and the config."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from hetegen_rec.config.run import DistributedConfig, TableConfig
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.distributed.sharding import TableSharder, make_sharders

logger = logging.getLogger(__name__)

HOST_SHARE = 0.8
"""Of a host's memory for tables and the copies that checkpoints are written from, unless configured."""

_GB = 1e9
_DEVICE_RESERVE = 0.15  # of a device's memory kept for activations, gradients and the dense part
_FALLBACK_DEVICE_BYTES = 32 * 10**9  # planning for CUDA where there is none
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_COLUMN_UNIT = 4  # the kernels' granularity in columns
_COLUMN_KINDS = ("column_wise", "table_column_wise", "grid_shard")
_WIDE = 256  # columns from which TorchRec splits a table into columns unasked
_MIN_ROWS_PER_RANK = 1024  # a thinner slice of rows costs more to exchange than it balances


class PlanningError(ValueError):
    """No plan satisfies the constraints and the memory. The message says what to change."""


@dataclass(frozen=True)
class Bandwidths:
    """What the planner weighs plans by, in bytes per second and rank."""

    device_memory: float
    host_memory: float
    host_device: float
    intra_host: float
    inter_host: float


GLOO = Bandwidths(device_memory=50e9, host_memory=50e9, host_device=50e9, intra_host=2e9, inter_host=1e9)
"""Of ranks on CPUs, by order of magnitude. They talk by TCP on one host too, where TorchRec would assume
NVLink, by which cutting tables into rows looks better than it is."""


@dataclass(frozen=True)
class Cluster:
    """The ranks and the memory that a plan is for."""

    device: Literal["cpu", "cuda"]
    world_size: int
    local_world_size: int
    """Ranks per host."""
    host_bytes: int
    """Memory per host, shared by its ranks, for tables and the copies that checkpoints come from."""
    device_bytes: int = 0
    """Memory per CUDA device; 0 on CPU."""
    bandwidths: Bandwidths | None = None
    """None for TorchRec's own assumptions."""

    @property
    def host_bytes_per_rank(self) -> int:
        """One rank's share of its host's memory."""
        return self.host_bytes // self.local_world_size


@dataclass(frozen=True)
class PlannedTable:
    """One line of a plan, for tables on a screen and for a checkpoint's metadata."""

    table: str
    rows: int
    dim: int
    sharding: str
    kernel: str
    ranks: tuple[int, ...]
    mib: float
    """Weights of the whole table in MiB, without optimizer state."""


def describe_cluster(
    config: DistributedConfig,
    device: Literal["cpu", "cuda"],
    world_size: int,
    local_world_size: int,
) -> Cluster:
    """A cluster of hosts like this one, with the configured memory where it is given.

    Needs no process group and no GPU, so that a large job can be planned anywhere.
    """
    host_bytes = int(HOST_SHARE * _host_memory())
    if config.host_memory_gb is not None:
        host_bytes = int(config.host_memory_gb * _GB)
    device_bytes = _device_memory(config) if device == "cuda" else 0
    bandwidths = GLOO if device == "cpu" else None
    return Cluster(device, world_size, local_world_size, host_bytes, device_bytes, bandwidths)


def agree_on_plan(
    runtime: Runtime, model: nn.Module, config: DistributedConfig, batch_size: int
) -> ShardingPlan:
    """Plans on rank 0 and hands the plan, or the error, to every rank. A collective.

    Args:
        runtime: this process's view of the job.
        model: holds an EmbeddingBagCollection on `meta`, its table optimizer attached.
        config: constraints and memory.
        batch_size: rows of a step on one rank.

    Raises:
        PlanningError: on every rank, if rank 0 found no plan.
    """
    outcome: ShardingPlan | PlanningError | None = None
    if runtime.is_main:
        device: Literal["cpu", "cuda"] = "cuda" if runtime.device.type == "cuda" else "cpu"
        try:
            cluster = describe_cluster(config, device, runtime.world_size, runtime.local_world_size)
            outcome = make_plan(model, config, cluster, batch_size)
        except PlanningError as error:
            outcome = error
        except Exception as error:  # whatever it is, the other ranks are waiting for an answer
            logger.exception("planning failed")
            outcome = PlanningError(f"planning failed: {type(error).__name__}: {error}")
    outcome = runtime.broadcast(outcome)
    if isinstance(outcome, PlanningError):
        raise outcome
    return outcome


def make_plan(model: nn.Module, config: DistributedConfig, cluster: Cluster, batch_size: int) -> ShardingPlan:
    """Plans for a cluster, in this process alone.

    Args:
        model: holds an EmbeddingBagCollection on `meta`, its table optimizer attached.
        config: constraints per table.
        cluster: ranks and memory.
        batch_size: rows of a step on one rank.

    Raises:
        PlanningError: a constraint that the device cannot meet, or tables that do not fit.
    """
    sharders = make_sharders(config, cluster.device)
    tables = _tables(model)
    constraints = {table.name: _constrain(table, config, cluster, sharders[0]) for table in tables}
    planner = EmbeddingShardingPlanner(
        topology=_topology(cluster, _host_bytes_for_tables(cluster, tables)),
        batch_size=batch_size,
        constraints=constraints,
        storage_reservation=FixedPercentageStorageReservation(_DEVICE_RESERVE),
        stats=[],
    )
    try:
        return planner.plan(model, sharders)
    except PlannerError as error:
        raise PlanningError(_explain(error, tables, cluster)) from error


def plan_summary(plan: ShardingPlan, model: nn.Module) -> list[PlannedTable]:
    """One line per table, the largest first.

    Args:
        plan: a plan for the model.
        model: the model *before* sharding.
    """
    placed = {name: sharding for module in plan.plan.values() for name, sharding in module.items()}
    lines = [
        PlannedTable(
            table=table.name,
            rows=table.num_embeddings,
            dim=table.embedding_dim,
            sharding=placed[table.name].sharding_type,
            kernel=placed[table.name].compute_kernel,
            ranks=tuple(sorted(set(placed[table.name].ranks))),
            mib=round(_table_bytes(table) / 2**20, 3),
        )
        for table in _tables(model)
    ]
    return sorted(lines, key=lambda line: -line.mib)


def plan_as_json(lines: Sequence[PlannedTable]) -> list[dict[str, Any]]:
    """The lines of `plan_summary` as JSON values, to be kept with a checkpoint."""
    return [{**asdict(line), "ranks": list(line.ranks)} for line in lines]


def _host_memory() -> int:
    """Bytes that this process may use: the machine's, or its container's where that is less."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = _CGROUP_LIMIT.read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _device_memory(config: DistributedConfig) -> int:
    if config.device_memory_gb is not None:
        return int(config.device_memory_gb * _GB)
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    logger.warning(
        "no CUDA device here to ask for its memory: planning for %.0f GB each; set "
        "distributed.device_memory_gb to plan for another size",
        _FALLBACK_DEVICE_BYTES / _GB,
    )
    return _FALLBACK_DEVICE_BYTES


def _host_bytes_for_tables(cluster: Cluster, tables: Sequence[EmbeddingBagConfig]) -> int:
    """What a rank may hold of tables in its host's memory, beside the copy that checkpoints are written from.

    The copy is as large as all that the rank holds, on its device too. Before the plan no more is known of
    the device's part than that it is at most what the device takes, or all there is.
    """
    on_device = min((1 - _DEVICE_RESERVE) * cluster.device_bytes, sum(map(_table_bytes, tables)))
    return max(1, int(cluster.host_bytes_per_rank - on_device) // 2)  # TorchRec wants a positive number


def _topology(cluster: Cluster, host_bytes_for_tables: int) -> Topology:
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=cluster.world_size,
            local_world_size=cluster.local_world_size,
            ddr_cap_bytes=host_bytes_for_tables,
            hbm_cap_bytes=cluster.device_bytes or None,
        ),
        hardware_config=_hardware(cluster.bandwidths),
        kernel_config=KernelConfig(
            compute_device=cluster.device, use_hardware_based_bandwidth=cluster.bandwidths is not None
        ),
    )


def _hardware(bandwidths: Bandwidths | None) -> HardwareConfig | None:
    if bandwidths is None:
        return None
    per_ms = 1 / 1000  # TorchRec counts in bytes per millisecond
    return HardwareConfig(
        hbm_mem_bw=bandwidths.device_memory * per_ms,
        ddr_mem_bw=bandwidths.host_memory * per_ms,
        hbm_to_ddr_mem_bw=bandwidths.host_device * per_ms,
        intra_host_bw=bandwidths.intra_host * per_ms,
        inter_host_bw=bandwidths.inter_host * per_ms,
    )


def _tables(model: nn.Module) -> list[EmbeddingBagConfig]:
    return [
        config
        for module in model.modules()
        if isinstance(module, EmbeddingBagCollection)
        for config in module.embedding_bag_configs()
    ]


def _constrain(
    table: EmbeddingBagConfig, config: DistributedConfig, cluster: Cluster, sharder: TableSharder
) -> ParameterConstraints:
    name = table.name
    key = name if name in config.tables else "default"
    wanted = config.tables.get(key, TableConfig())
    offered = sharder.sharding_types(cluster.device)
    for kind in wanted.sharding:
        if kind not in offered:
            raise PlanningError(
                f"distributed.tables.{key}.sharding: {kind} is not possible on {cluster.device}; "
                f"choose among {', '.join(offered)}"
            )
    kinds: list[str] = list(wanted.sharding) or _default_kinds(table, cluster)
    kinds = _without_lost_means(kinds, table, key)
    kinds = _without_empty_shards(kinds, table, key, cluster)
    if wanted.kernel is not None:
        _check_kernel(wanted.kernel, key, kinds, cluster, sharder)
    return ParameterConstraints(
        sharding_types=kinds,
        compute_kernels=None if wanted.kernel is None else [wanted.kernel],
        min_partition=_narrowest_shard(table.embedding_dim, cluster, wanted),
    )


def _default_kinds(table: EmbeddingBagConfig, cluster: Cluster) -> list[str]:
    """What the planner may choose unasked: the kinds that differ for this table, whole tables first.

    Never replication: it would come and go with the number of ranks, and only the state of Adagrad and SGD
    moves between replicated and sharded tables.
    """
    kinds = ["table_wise"]
    if cluster.world_size == 1:
        return kinds
    if table.embedding_dim >= _WIDE:
        kinds.append("column_wise")
    if table.num_embeddings >= _MIN_ROWS_PER_RANK * cluster.world_size:
        kinds.append("row_wise")
    if 1 < cluster.local_world_size < cluster.world_size and (
        table.num_embeddings >= _MIN_ROWS_PER_RANK * cluster.local_world_size
    ):
        kinds.append("table_row_wise")
    return kinds


def _without_lost_means(kinds: Sequence[str], table: EmbeddingBagConfig, key: str) -> list[str]:
    """The kinds that average lists: TorchRec 1.8 adds up what `grid_shard` cut, and does not divide it."""
    kept = [kind for kind in kinds if kind != "grid_shard"] if table.pooling == PoolingType.MEAN else [*kinds]
    if kept:
        return kept
    if key != "default":
        raise PlanningError(
            f"distributed.tables.{key}.sharding: grid_shard would add up the lists of {table.name} instead "
            "of averaging them, a fault of TorchRec; use column_wise, or row_wise"
        )
    logger.info("table %s averages lists, which grid_shard does not: table_wise", table.name)
    return ["table_wise"]


def _without_empty_shards(
    kinds: Sequence[str], table: EmbeddingBagConfig, key: str, cluster: Cluster
) -> list[str]:
    """The kinds that give every rank they use a row: FBGEMM's CPU kernels read past the end otherwise."""
    rows = table.num_embeddings
    ranks = {
        "row_wise": cluster.world_size,
        "table_row_wise": cluster.local_world_size,
        "grid_shard": cluster.local_world_size,
    }
    # Ranks get equal blocks of rows, the last one what is left.
    kept = [k for k in kinds if (ranks.get(k, 1) - 1) * math.ceil(rows / ranks.get(k, 1)) < rows]
    if kept:
        return kept
    if key != "default":
        raise PlanningError(
            f"distributed.tables.{key}.sharding: {', '.join(kinds)} cuts the {rows} rows of table "
            f"{table.name} so that some of {cluster.world_size} ranks get none; use table_wise"
        )
    logger.info("table %s with %d rows is too small for %s: table_wise", table.name, rows, ", ".join(kinds))
    return ["table_wise"]


def _check_kernel(
    kernel: str, key: str, kinds: Sequence[str], cluster: Cluster, sharder: TableSharder
) -> None:
    offered = {one for kind in kinds for one in sharder.compute_kernels(kind, cluster.device)}
    if kernel not in offered:
        raise PlanningError(
            f"distributed.tables.{key}.kernel: {kernel} does not exist on {cluster.device} for sharding "
            f"{', '.join(kinds)}; choose among {', '.join(sorted(offered))}, or leave it out"
        )


def _narrowest_shard(dim: int, cluster: Cluster, wanted: TableConfig) -> int | None:
    """Columns of the narrowest shard: one per rank where columns were asked for.

    TorchRec's default of 128 would leave most tables whole. None keeps that default, since unasked
    splitting into columns sends every id to more ranks.
    """
    if not any(kind in _COLUMN_KINDS for kind in wanted.sharding):
        return None
    target = max(_COLUMN_UNIT, -(-dim // cluster.world_size))
    widths = [w for w in range(_COLUMN_UNIT, dim + 1, _COLUMN_UNIT) if dim % w == 0 and w >= target]
    return min(widths, default=None)


def _table_bytes(table: EmbeddingBagConfig) -> int:
    return int(table.num_embeddings * table.embedding_dim * 4)


def _explain(error: PlannerError, tables: Sequence[EmbeddingBagConfig], cluster: Cluster) -> str:
    largest = sorted(tables, key=_table_bytes, reverse=True)
    listed = ", ".join(
        f"{table.name} ({table.num_embeddings:,} x {table.embedding_dim}, {_table_bytes(table) / _GB:.3f} GB)"
        for table in largest[:5]
    )
    total = sum(map(_table_bytes, tables))
    for_tables = _host_bytes_for_tables(cluster, tables)
    memory = (
        f"{cluster.host_bytes_per_rank / _GB:.3f} GB of host memory ({for_tables / _GB:.3f} GB for tables, "
        "beside the copy that checkpoints are written from)"
    )
    if cluster.device == "cuda":
        memory += f" and {cluster.device_bytes / _GB:.3f} GB of device memory"
    reason = str(error).split("Last planner error:")[-1].strip().splitlines()
    return (
        f"no sharding plan for {len(tables)} tables of {total / _GB:.3f} GB in all, weights alone, on "
        f"{cluster.world_size} ranks with {memory} each. Largest: {listed}. "
        f"Use more ranks, raise distributed.host_memory_gb or distributed.device_memory_gb, or let the "
        f"largest tables be row_wise under distributed.tables. Planner: {reason[0] if reason else error}"
    )
