"""Reads the weights of a checkpoint without a sharded model: tables piece by piece, in bounded memory."""

import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from hetegen_rec.training.checkpoint import CheckpointError, CheckpointInfo, causes
from hetegen_rec.training.checkpoint_store import Store

_PREFIX = "model."
_TABLE_KEY = "model.ebc.embedding_bags.{}.weight"


class StoredWeights:
    """The weights of one checkpoint, by one process, whatever ranks and plan wrote them."""

    def __init__(self, info: CheckpointInfo) -> None:
        """Opens a checkpoint that was checked to be whole."""
        self._info = info
        self._reader = Store(info.location).reader()
        self._stored = self._reader.read_metadata().state_dict_metadata

    def table_blocks(self, table: str) -> Iterator[tuple[int, Tensor]]:
        """The rows of a table in order, as pieces no larger than its stored shards.

        Yields:
            The first row of each piece, and [rows, dim] float32.
        """
        key = _TABLE_KEY.format(table)
        found = self._entry(key)
        bounds = sorted({edge for chunk in found.chunks for edge in _row_bounds(chunk)})
        for start, stop in pairwise(bounds):
            rows = torch.empty(stop - start, found.size[1])
            self._load({key: rows}, {key: start})
            yield start, rows

    def dense(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored values of parameters and buffers that every rank has, by name.

        Args:
            wanted: what to read, by its name in the model's state dict.

        Raises:
            CheckpointError: one is absent, or has another shape.
        """
        values = {name: torch.empty_like(here, device="cpu") for name, here in wanted.items()}
        for name, here in wanted.items():
            stored = self._entry(_PREFIX + name).size
            if stored != here.shape:
                raise self._error(f"{name} has shape {tuple(stored)} there, {tuple(here.shape)} here")
        self._load({_PREFIX + name: value for name, value in values.items()}, {})
        return values

    def _entry(self, key: str) -> TensorStorageMetadata:
        found = self._stored.get(key)
        if not isinstance(found, TensorStorageMetadata):
            raise self._error(f"it has no {key.removeprefix(_PREFIX)}")
        return found

    def _load(self, tensors: dict[str, Tensor], first_rows: Mapping[str, int]) -> None:
        planner = _PiecePlanner(tensors, first_rows)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load_shards(dict(tensors), storage_reader=self._reader, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise self._error(causes(error)) from error

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(
            f"{self._info.location}: does not fit this model, or is damaged: {problem}; use the model "
            "section of the configuration that the checkpoint was trained with"
        )


class _PiecePlanner(LoadPlanner):
    """Reads into tensors, each of which may begin at any row of what is stored under its name."""

    def __init__(self, tensors: Mapping[str, Tensor], first_rows: Mapping[str, int]) -> None:
        self._tensors, self._first_rows = tensors, first_rows
        self._metadata: Metadata | None = None

    def set_up_planner(
        self,
        state_dict: dict[str, Any],  # noqa: ARG002 - the tensors are known
        metadata: Metadata | None = None,
        is_coordinator: bool = False,  # noqa: ARG002
    ) -> None:
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        assert self._metadata is not None  # the argument is optional for planners that save
        items: list[ReadItem] = []
        for key, tensor in self._tensors.items():
            offsets = [0] * tensor.dim()
            if key in self._first_rows:
                offsets[0] = self._first_rows[key]
            piece = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=tensor.size())
            stored = self._metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(key, stored, [piece])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError(f"{read_item.dest_index.fqn} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._tensors[_key(read_item.dest_index)]
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, start, length)
        return target.detach()

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The tensor is a view of its target, so nothing is left to do."""


def _key(index: MetadataIndex) -> str:
    return index.fqn


def _row_bounds(chunk: ChunkStorageMetadata) -> tuple[int, int]:
    return chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
