"""Memory, traffic and time of a training step on a cluster that need not exist: estimates, not measured.

Bytes follow from the sharding plan and from what the network says it needs. Times divide bytes and FLOP by
what vendors state of the hardware, times the shares that its profile assumes to be usable. docs/capacity.md
has the formulas.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hetegen_rec.config.hardware import HardwareProfile, RankHardware, share_of_rank
from hetegen_rec.config.plan import World
from hetegen_rec.config.run import CommunicationPrecision, DistributedConfig, TableOptimizer
from hetegen_rec.distributed.planning import HOST_SHARE, Bandwidths, Cluster
from hetegen_rec.distributed.traffic import (
    ID_BYTES,
    WEIGHT_BYTES,
    Block,
    Matrix,
    TableLoad,
    all_reduce_by_rank,
    busiest,
    exchange,
    sent_by_rank,
)
from hetegen_rec.models.footprint import Footprint

_GIGA = 1e9
_TOUCHES = 3  # of a table row's numbers by a lookup: read forward; read and written by the update
_DENSE_COPIES = 4  # of what trains, besides the weights: gradient, its bucket, two moments of AdamW
_MOMENTS = 2  # of AdamW, that a checkpoint holds besides the weights
_ACTIVATION_TOUCHES = (
    5  # of what forward keeps: written, read on, read backward; its gradient written and read
)
_BATCHES_IN_FLIGHT = 3  # by the sparse pipeline: on its way to the device, exchanging ids, in the network
_BACKWARD = 2 / 3  # of the FLOP of a step
_DEVICE_SHARE = {"fused_uvm": 0.0, "fused_uvm_caching": 0.2}
"""Of a table's rows, and of its lookups, that the device holds; 0.2 is TorchRec's default for caches."""
_SECTOR = {"cuda": 32, "cpu": 64}
"""Bytes that memory moves at least, of a row that may stand anywhere: a sector, a cache line."""
_LARGEST_ROWS = 1 << 20


@dataclass(frozen=True)
class Setting:
    """All that a step's cost depends on besides its rows."""

    world: World
    profile: HardwareProfile
    cap: float
    """Bytes that a rank has: of its device, or its share of the host's memory."""
    host_cap: float
    """Bytes of a rank's share of its host's memory."""
    blocks: Sequence[Block]
    copies: Sequence[TableLoad]
    """Replicated tables."""
    loads: Sequence[TableLoad]
    footprint: Footprint
    table_optimizer: TableOptimizer
    batch_row_bytes: float
    """Bytes of one row of a batch on its way to the device."""
    precision: str = "fp32"
    forward: CommunicationPrecision = "fp32"
    backward: CommunicationPrecision = "fp32"

    @property
    def hardware(self) -> RankHardware:
        """One rank's share, as vendors state it."""
        return share_of_rank(self.profile, self.world.local_size, self.precision)


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank at the peak of a step."""

    tables: float
    table_optimizer: float
    dense: float
    """Weights of the network, their gradients, buckets and moments."""
    activations: float
    exchange: float
    """Looked-up rows before and after they are exchanged, and their gradients."""
    batches: float
    checkpoint: float
    """The copy of weights and optimizer states for checkpoints, if it stands beside them."""
    reserve: float
    host_tables: float
    """In the host's memory while the rest is on a device; not part of the total."""
    host_checkpoint: float
    """The copy, if the rest is on a device; not part of the total."""

    @property
    def total(self) -> float:
        """Where the network runs: on the device, or on a host without."""
        return (
            self.tables
            + self.table_optimizer
            + self.dense
            + self.activations
            + self.exchange
            + self.batches
            + self.checkpoint
            + self.reserve
        )

    @property
    def on_host(self) -> float:
        """In the host's memory while the rest is on a device."""
        return self.host_tables + self.host_checkpoint


@dataclass(frozen=True)
class LinkBytes:
    """What one collective moves in a step: bytes through the busiest rank, and those of all ranks."""

    intra_host: float
    inter_host: float
    host_device: float
    total: float
    """Over all links and ranks."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they are spent on, were nothing done at the same time."""

    compute: float
    """Of the network: matrix products, or memory for what they read and write, whichever takes longer."""
    lookup: float
    ids: float
    forward: float
    backward: float
    dense: float
    """The all-reduce of dense gradients."""
    host_device: float
    """Batches on their way to the device."""
    host_tables: float
    """Rows of tables in the host's memory, which the lookup waits for."""

    @property
    def serial(self) -> float:
        """Nothing overlaps."""
        return self.compute + self.lookup + self.communication

    @property
    def communication(self) -> float:
        """All exchanges, those with the host included."""
        return self.ids + self.forward + self.backward + self.dense + self.host_device + self.host_tables

    @property
    def overlapped(self) -> float:
        """The ids and copies of the next batch behind the step, the all-reduce behind the backward pass."""
        left = max(0.0, self.dense - _BACKWARD * self.compute)
        step = self.compute + self.lookup + self.host_tables + self.forward + self.backward + left
        return max(step, self.ids + self.host_device)


@dataclass(frozen=True)
class HotSpot:
    """Where most looked-up numbers come from."""

    rank: int
    times_mean: float
    """What it sends, relative to the mean of all ranks."""
    table: str
    """That most of it is of."""
    sharding: str
    """Of that table."""


def cluster_of(profile: HardwareProfile, world: World, config: DistributedConfig) -> Cluster:
    """The cluster for the planner; what the configuration says of memory goes before the profile."""
    hardware = share_of_rank(profile, world.local_size, "fp32")
    host = config.host_memory_gb or HOST_SHARE * profile.host_memory_gb
    device = config.device_memory_gb or profile.device_memory_gb or 0.0
    return Cluster(
        profile.device,
        world.size,
        world.local_size,
        host_bytes=int(host * _GIGA),
        device_bytes=int(device * _GIGA) if profile.device == "cuda" else 0,
        bandwidths=Bandwidths(
            device_memory=hardware.memory_bandwidth,
            host_memory=hardware.host_bandwidth,
            host_device=min(hardware.host_device, hardware.host_bandwidth),
            intra_host=hardware.intra_host,
            inter_host=hardware.inter_host,
        ),
    )


def memory_by_rank(setting: Setting, rows: int) -> list[RankMemory]:
    """What every rank holds at the peak of a step.

    Args:
        setting: plan, network and hardware.
        rows: of the data on each rank.
    """
    size, assumed = setting.world.size, setting.profile.assumptions
    tables, states, hosted, copied, looked_up = (np.zeros(size) for _ in range(5))
    for block in setting.blocks:
        on_device = _DEVICE_SHARE.get(block.kernel, 1.0)
        for rank, share in zip(block.ranks, block.shares, strict=True):
            shard_rows = share * block.load.rows
            weights = shard_rows * block.columns * WEIGHT_BYTES
            state = shard_rows * _state_bytes(setting.table_optimizer, block.columns)
            state_on_device = shard_rows * _device_state_bytes(setting.table_optimizer, block)
            tables[rank] += weights * on_device
            states[rank] += state_on_device
            hosted[rank] += weights * (on_device < 1.0) + state - state_on_device
            copied[rank] += weights + state
            looked_up[rank] += size * rows * block.load.num_keys * block.columns * WEIGHT_BYTES
    received = rows * sum(load.num_keys * load.dim for load in setting.loads) * WEIGHT_BYTES
    copies = sum(load.rows * load.dim for load in setting.copies) * WEIGHT_BYTES
    copied_states = sum(
        load.rows * _state_bytes(setting.table_optimizer, load.dim) for load in setting.copies
    )
    footprint = setting.footprint
    dense = (footprint.parameters + _DENSE_COPIES * footprint.trained_parameters) * WEIGHT_BYTES
    copied += copies + copied_states
    copied += (footprint.parameters + _MOMENTS * footprint.trained_parameters) * WEIGHT_BYTES
    is_device = setting.profile.device == "cuda"
    return [
        RankMemory(
            tables=float(tables[rank]) + copies,
            table_optimizer=float(states[rank]) + copied_states,
            dense=dense + 2 * copies,  # the gradient of a copy is dense too, and stands in a bucket
            activations=assumed.activations * footprint.saved_bytes.at(rows),
            exchange=2 * (float(looked_up[rank]) + received),
            batches=_BATCHES_IN_FLIGHT * rows * setting.batch_row_bytes,
            checkpoint=0.0 if is_device else float(copied[rank]),
            reserve=assumed.reserve_gb * _GIGA if is_device else 0.0,
            host_tables=float(hosted[rank]),
            host_checkpoint=float(copied[rank]) if is_device else 0.0,
        )
        for rank in range(size)
    ]


def fits(setting: Setting, memory: Sequence[RankMemory]) -> bool:
    """Whether every rank has what it needs."""
    return all(one.total <= setting.cap and one.on_host <= setting.host_cap for one in memory)


def traffic_by_collective(setting: Setting, rows: int) -> dict[str, LinkBytes]:
    """Bytes of one step by collective; rows are those of the data on each rank."""
    world = setting.world
    moved = exchange(setting.blocks, world, rows, setting.forward, setting.backward)
    gradients = setting.footprint.trained_parameters + sum(load.rows * load.dim for load in setting.copies)
    intra, inter = all_reduce_by_rank(gradients * WEIGHT_BYTES, world)
    found = {
        "ids": _links(moved.ids, world),
        "forward": _links(moved.forward, world),
        "backward": _links(moved.backward, world),
        "dense": LinkBytes(intra, inter, 0.0, (intra + inter) * world.size),
    }
    if setting.profile.device == "cuda":
        copied = rows * setting.batch_row_bytes
        found["host_device"] = LinkBytes(0.0, 0.0, copied, copied * world.size)
        hosted = _lookup_bytes(setting, rows, on_device=False)
        if hosted.any():
            found["host_tables"] = LinkBytes(0.0, 0.0, float(hosted.max()), float(hosted.sum()))
    return found


def step_time(setting: Setting, rows: int) -> StepTime:
    """Seconds of one step; rows are those of the data on each rank."""
    hardware, assumed = setting.hardware, setting.profile.assumptions
    memory_bandwidth = hardware.memory_bandwidth * assumed.memory
    products = setting.footprint.flops.at(rows) / (hardware.flops * assumed.compute)
    passes = _ACTIVATION_TOUCHES * setting.footprint.saved_bytes.at(rows) / memory_bandwidth
    lookup = float(_lookup_bytes(setting, rows, on_device=True).max())
    traffic = traffic_by_collective(setting, rows)

    def seconds(name: str) -> float:
        moved = traffic.get(name, LinkBytes(0.0, 0.0, 0.0, 0.0))
        links = (
            moved.intra_host / hardware.intra_host,
            moved.inter_host / hardware.inter_host,
            moved.host_device / hardware.host_device,
        )
        return max(links) / assumed.links

    return StepTime(
        compute=max(products, passes),
        lookup=lookup / memory_bandwidth,
        ids=seconds("ids"),
        forward=seconds("forward"),
        backward=seconds("backward"),
        dense=seconds("dense"),
        host_device=seconds("host_device"),
        host_tables=seconds("host_tables"),
    )


def hot_spot(setting: Setting) -> HotSpot | None:
    """The rank that sends most looked-up numbers; None where no rank does."""
    size = setting.world.size
    sent = np.zeros(size)
    for block in setting.blocks:
        sent[list(block.ranks)] += block.load.num_keys * block.columns
    rank = int(sent.argmax())
    on_rank = [block for block in setting.blocks if rank in block.ranks]
    if not on_rank:
        return None
    most = max(on_rank, key=lambda block: block.load.num_keys * block.columns)
    return HotSpot(rank, float(sent[rank] / sent.mean()), most.load.name, most.sharding)


def largest_rows(is_possible: Callable[[int], bool], limit: int = _LARGEST_ROWS) -> int:
    """The largest power of two, up to a limit, that is possible with all smaller ones; 0 if none is."""
    found, rows = 0, 1
    while rows <= limit and is_possible(rows):
        found, rows = rows, 2 * rows
    return found


def _links(matrix: Matrix, world: World) -> LinkBytes:
    intra, inter = busiest(matrix, world)
    sent = sent_by_rank(matrix, world)
    return LinkBytes(intra, inter, 0.0, float(sent[0].sum() + sent[1].sum()))


def _lookup_bytes(setting: Setting, rows: int, *, on_device: bool) -> NDArray[np.float64]:
    """[W] bytes of table rows and looked-up vectors that memory moves, or that come from the host's.

    Repeated ids count each time: caches may do better.
    """
    moved = np.zeros(setting.world.size)
    sector, is_host = _SECTOR[setting.profile.device], setting.profile.device == "cpu"
    for block in setting.blocks:
        here = 1.0 if is_host else _DEVICE_SHARE.get(block.kernel, 1.0)
        part = here if on_device else 1.0 - here
        for rank, share in zip(block.ranks, block.shares, strict=True):
            row = block.columns * WEIGHT_BYTES
            state = _device_state_bytes(setting.table_optimizer, block)
            if not on_device:
                state = _state_bytes(setting.table_optimizer, block.columns) - state
            touched = part * (_TOUCHES * _in_sectors(row, sector) + ID_BYTES) + 2 * _in_sectors(state, sector)
            ids = setting.world.size * rows * block.load.ids * share
            bags = setting.world.size * rows * block.load.num_keys
            moved[rank] += ids * touched
            moved[rank] += on_device * 2 * bags * row  # written forward, their gradients read backward
    if on_device:
        moved += rows * sum(_TOUCHES * load.ids * load.dim * WEIGHT_BYTES for load in setting.copies)
    return moved


def _in_sectors(num_bytes: float, sector: int) -> float:
    return math.ceil(num_bytes / sector) * sector


def _state_bytes(optimizer: TableOptimizer, columns: int) -> float:
    """Bytes of optimizer state per row of a shard, in fp32."""
    numbers = {
        "rowwise_adagrad": 1,
        "adagrad": columns,
        "sgd": 0,
        "adam": 2 * columns,
        "partial_rowwise_adam": columns + 1,
        "lamb": 2 * columns,
    }
    return numbers[optimizer] * WEIGHT_BYTES


def _device_state_bytes(optimizer: TableOptimizer, block: Block) -> float:
    """Of `_state_bytes`, what stands beside the network.

    Where rows are in the host's memory, cached or not, that is the one number a row alone: FBGEMM's
    `construct_split_state` leaves the rest with the host, and caches none of it.
    """
    if block.kernel not in _DEVICE_SHARE:
        return _state_bytes(optimizer, block.columns)
    return WEIGHT_BYTES if optimizer in ("rowwise_adagrad", "partial_rowwise_adam") else 0.0
