"""Reading a checkpoint into parameters that have more rows than were stored."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hetegen_rec.distributed.sharding import global_shape


@dataclass(frozen=True)
class Growth:
    """Rows of a parameter: as stored, and as they are here."""

    before: int
    after: int


class GrowingLoadPlanner(DefaultLoadPlanner):
    """Reads the stored rows of parameters that have grown, and leaves their new rows as they are.

    A grown parameter's new rows follow the stored ones. Whatever lies under its name and has a row per row of
    the parameter grows with it: the weight and the optimizer's state, sharded by any plan, or replicated. All
    else must have the stored shape, or planning fails with an error that names the key and both shapes; so
    does a key that the checkpoint lacks.
    """

    def __init__(self, grown: Mapping[str, Growth]) -> None:
        """Allows some parameters to grow.

        Args:
            grown: by a parameter's name in the model's state dict, which is its name in the optimizer's
                state as well.
        """
        # Flattening, which is for tensors sharded twice, would hide tensors without a shard on this rank here
        # and show them again when reads are planned.
        super().__init__(flatten_sharded_tensors=False)
        self._grown = dict(grown)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Takes in what to load and what is stored."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None  # the argument is optional for planners that save
        stored = dict(metadata.state_dict_metadata)
        for key, value in self.state_dict.items():
            entry = stored.get(key)
            if isinstance(entry, TensorStorageMetadata) and self._has_grown(key, entry.size, value):
                # Reads follow from the stored chunks, which stay; the size only decides whether they fit.
                stored[key] = replace(entry, size=torch.Size(global_shape(value)))
        self.metadata = replace(metadata, state_dict_metadata=stored)

    def _has_grown(self, key: str, stored: torch.Size, value: ShardedTensor | torch.Tensor) -> bool:
        growth = next((growth for name, growth in self._grown.items() if f".{name}." in f".{key}."), None)
        if growth is None:
            return False
        here = global_shape(value)
        return tuple(stored) == (growth.before, *here[1:]) and here[:1] == (growth.after,)
