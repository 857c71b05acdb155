"""Embedding tables over ranks: what may be sharded how, the sharded model, and its first weights."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from fbgemm_gpu.quantize_comm import QuantizationContext, QuantizedCommCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper
from torchrec.distributed.types import ShardingPlan, ShardingType

from hetegen_rec.config.run import DistributedConfig
from hetegen_rec.data.hashing import mix64_torch, salt_of
from hetegen_rec.distributed.huge_pages import use_huge_pages
from hetegen_rec.distributed.runtime import Runtime

_ROW_WISE_FAMILY = (
    ShardingType.ROW_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
    ShardingType.GRID_SHARD.value,
)
_TABLE_PATH = ".embedding_bags."
_CELLS_AT_ONCE = 1 << 22  # of a shard while it is filled: 32 MiB of 64-bit counters
_HALF_SCALE = 1024.0  # of gradients in fp16; a power of two, which rounds nothing


class TableSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder that also offers the row-wise family on CPU.

    Its reduce-scatter runs on gloo as well, so what large jobs do on GPUs can be tested, and tables
    larger than a host trained, without one.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Sharding types offered on a device type."""
        types: list[str] = super().sharding_types(compute_device_type)
        if compute_device_type == "cpu":
            types = [*types, *_ROW_WISE_FAMILY]
        return types


class _ScaledHalf(QuantizedCommCodec):
    """Gradients as fp16 on the wire, scaled: those of a mean over many rows would be rounded to zero.

    FBGEMM's own `loss_scale` is taken back while the numbers are still fp16, which rounds them to zero then.
    """

    def __init__(self) -> None:
        super().__init__(SparseType.FP16, is_fwd=False)

    def encode(self, input_tensor: torch.Tensor, ctx: QuantizationContext | None = None) -> torch.Tensor:
        return super().encode(_HALF_SCALE * input_tensor, ctx)

    def decode(self, input_tensor: torch.Tensor, ctx: QuantizationContext | None = None) -> torch.Tensor:
        return super().decode(input_tensor, ctx) / _HALF_SCALE


def make_sharders(config: DistributedConfig, device_type: str) -> list[TableSharder]:
    """The sharders for planning and sharding, with the configured precision of communication.

    On CPU bf16 becomes fp16, which is what gloo can reduce.
    """
    registry = get_qcomm_codecs_registry(
        QCommsConfig(
            forward_precision=CommType(config.forward_precision),
            backward_precision=CommType(config.backward_precision),
        ),
        device=torch.device(device_type),
    )
    for codecs in (registry or {}).values():
        if codecs.backward.quantized_dtype == torch.float16:
            codecs.backward = _ScaledHalf()
    return [TableSharder(qcomm_codecs_registry=registry)]


def shard_model(
    model: nn.Module, plan: ShardingPlan, runtime: Runtime, config: DistributedConfig
) -> DistributedModelParallel:
    """Spreads the tables over the ranks by the plan and replicates the rest. A collective.

    Every parameter that requires a gradient must get one in every step; a stage freezes what it does not
    train. Outputs that the model returns beside the loss must be detached.

    Args:
        model: holds an EmbeddingBagCollection on `meta`, its table optimizer attached; the rest on CPU or
            on the device, equal on all ranks.
        plan: where each table goes.
        runtime: this process's view of the job.
        config: precision of the communication.
    """
    return DistributedModelParallel(
        model,
        device=runtime.device,
        plan=plan,
        sharders=make_sharders(config, runtime.device.type),
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False, find_unused_parameters=False),
    )


def table_weights(model: DistributedModelParallel) -> dict[str, ShardedTensor | torch.Tensor]:
    """Weights [rows, dim] by table name: a ShardedTensor, or a plain tensor where it is replicated.

    They share memory with the model. Listing them is a collective.
    """
    return tables_in(model.state_dict())


def tables_in(state: Mapping[str, Any]) -> dict[str, ShardedTensor | torch.Tensor]:
    """The weights by table name in the state dictionary of a model."""
    return {key.split(".")[-2]: value for key, value in state.items() if _TABLE_PATH in f".{key}"}


def global_shape(tensor: ShardedTensor | torch.Tensor) -> tuple[int, ...]:
    """Shape of a tensor over all ranks."""
    size = tensor.metadata().size if isinstance(tensor, ShardedTensor) else tensor.shape
    return tuple(size)


def local_parts(tensor: ShardedTensor | torch.Tensor) -> list[torch.Tensor]:
    """What of a tensor this rank holds: its shards, which may be none, or all of a replicated one."""
    if isinstance(tensor, ShardedTensor):
        return [shard.tensor for shard in tensor.local_shards()]
    return [tensor]


def move_tables_to_huge_pages(model: DistributedModelParallel) -> None:
    """Moves tables, and what their fused optimizer keeps by row. A collective. On devices it does nothing."""
    if model.device.type != "cpu":
        return
    states = model.fused_optimizer.state_dict()["state"].values()
    for tensor in [*table_weights(model).values(), *(value for state in states for value in state.values())]:
        for part in local_parts(tensor):
            use_huge_pages(part)


@torch.no_grad()
def init_tables(model: DistributedModelParallel, seed: int, std: float) -> None:
    """Fills every table with normal values of mean 0, before the first step.

    Each value depends only on the seed, the table's name, its row and its column. So a run starts from
    the same weights whatever the plan and the number of ranks.

    Args:
        model: the sharded model.
        seed: another seed gives other values.
        std: standard deviation.
    """
    for name, weights in table_weights(model).items():
        salt = salt_of(f"{seed}/{name}")
        dim = global_shape(weights)[1]
        if not isinstance(weights, ShardedTensor):
            _fill_normal(weights, (0, 0), dim, salt, std)
            continue
        for shard in weights.local_shards():
            row, column = shard.metadata.shard_offsets
            _fill_normal(shard.tensor, (row, column), dim, salt, std)


def initial_rows(table: str, start: int, stop: int, dim: int, seed: int, std: float) -> torch.Tensor:
    """[stop - start, dim]: what `init_tables` fills these rows of a table with."""
    rows = torch.empty(stop - start, dim)
    _fill_normal(rows, (start, 0), dim, salt_of(f"{seed}/{table}"), std)
    return rows


def initial_vectors(table: str, ids: torch.Tensor, dim: int, seed: int, std: float) -> torch.Tensor:
    """[len(ids), dim]: what `init_tables` fills the rows of these ids with."""
    cells = ids[:, None] * dim + torch.arange(dim)  # the index in the whole table
    return std * _normal(mix64_torch(cells, salt_of(f"{seed}/{table}")))


def _fill_normal(shard: torch.Tensor, offsets: tuple[int, int], dim: int, salt: int, std: float) -> None:
    """Fills one shard, whose first cell is at `offsets` of a table `dim` wide, in bounded memory."""
    rows, columns = shard.shape
    column = torch.arange(offsets[1], offsets[1] + columns, device=shard.device)
    step = max(1, _CELLS_AT_ONCE // max(1, columns))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        row = torch.arange(offsets[0] + start, offsets[0] + stop, device=shard.device)
        cells = row[:, None] * dim + column  # [stop - start, columns], the index in the whole table
        shard[start:stop] = std * _normal(mix64_torch(cells, salt))


def _normal(bits: torch.Tensor) -> torch.Tensor:
    """Standard normal values from 64 random bits each (Box-Muller on two times 24 bits)."""
    mask = (1 << 24) - 1
    radius = ((bits & mask) + 1).float() / (1 << 24)  # (0, 1], exact in float32
    angle = ((bits >> 24) & mask).float() / (1 << 24)  # [0, 1)
    return torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)
