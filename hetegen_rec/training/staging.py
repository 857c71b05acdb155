"""Copies of a sharded state in host memory: all that training waits for when a checkpoint is written."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.remote_device import _remote_device


class HostCopies:
    """Copies a state dictionary into buffers that are made once and used again for every checkpoint.

    They take as much host memory as the rank's part of the state; where that lives on a CUDA device they
    are pinned, so that the copies run at the speed of the bus. DCP's own staging knows no ShardedTensor
    (PyTorch 2.13), hence this one.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of the state as it is now; it holds until the next call.

        Args:
            state: nested dictionaries of tensors, ShardedTensors and plain values.
        """
        copied: dict[str, Any] = self._copy("", state)
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, path: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._copy(f"{path}/{key}", part) for key, part in value.items()}
        if isinstance(value, ShardedTensor):
            return self._copy_sharded(path, value)
        if isinstance(value, Tensor):
            return self._copy_tensor(path, value)
        if isinstance(value, list | tuple):
            return type(value)(self._copy(f"{path}/{index}", part) for index, part in enumerate(value))
        return value

    def _copy_sharded(self, path: str, value: ShardedTensor) -> ShardedTensor:
        shards = [
            Shard(self._copy_tensor(f"{path}/{index}", shard.tensor), _on_host(shard.metadata))
            for index, shard in enumerate(value.local_shards())
        ]
        is_pinned = any(shard.tensor.is_pinned() for shard in shards)
        whole = value.metadata()
        metadata = ShardedTensorMetadata(
            shards_metadata=[_on_host(shard) for shard in whole.shards_metadata],
            size=whole.size,
            tensor_properties=replace(whole.tensor_properties, pin_memory=is_pinned, requires_grad=False),
        )
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, metadata, process_group=value._process_group
        )

    def _copy_tensor(self, path: str, value: Tensor) -> Tensor:
        value = value.detach()
        buffer = self._buffers.get(path)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[path] = buffer
        return buffer.copy_(value, non_blocking=value.is_cuda)


def _on_host(shard: ShardMetadata) -> ShardMetadata:
    rank = shard.placement.rank() if isinstance(shard.placement, _remote_device) else None
    if rank is None:
        raise ValueError(f"a shard without a rank: {shard}")
    return ShardMetadata(shard.shard_offsets, shard.shard_sizes, f"rank:{rank}/cpu")
