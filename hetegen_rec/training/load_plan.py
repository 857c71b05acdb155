"""Reading a checkpoint into parameters that have more rows than were stored, and what cannot be read so."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hetegen_rec.config.schema import NUM_RESERVED_IDS
from hetegen_rec.distributed.sharding import global_shape

Shape: TypeAlias = tuple[int, ...]

_TABLE = re.compile(r"\.embedding_bags\.([^.]+)\.weight\.")


@dataclass(frozen=True)
class Growth:
    """Rows of a parameter: as stored, and as they are here."""

    before: int
    after: int

    def explains(self, stored: Shape, here: Shape) -> bool:
        """Whether one shape becomes the other by new rows, and by nothing else."""
        return (stored[:1], here[:1]) == ((self.before,), (self.after,)) and stored[1:] == here[1:]


def grown_parameters(
    state: Mapping[str, ShardedTensor | torch.Tensor],
    heads: Mapping[str, str],
    stored_rows: Mapping[str, int],
) -> dict[str, Growth]:
    """The parameters that a checkpoint holds with fewer rows, for `GrowingLoadPlanner`.

    Args:
        state: the model's state dict.
        heads: names of the parameters with a row per value of a table, and that table, as
            `vocabulary_parameters` finds them.
        stored_rows: rows of each table in the checkpoint, the reserved ones included.
    """
    tables = {match[1]: key for key in state if (match := _TABLE.search(f".{key}."))}
    rows = {table: global_shape(state[key])[0] for table, key in tables.items()}
    grown = {table for table, stored in stored_rows.items() if stored < rows.get(table, 0)}
    weights = {tables[table]: Growth(stored_rows[table], rows[table]) for table in grown}
    values = {
        name: Growth(stored_rows[table] - NUM_RESERVED_IDS, rows[table] - NUM_RESERVED_IDS)
        for name, table in heads.items()
        if table in grown
    }
    return weights | values


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
            grown: from `grown_parameters`; the optimizer's state is kept under the same names.
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
        growth = _growth_of(key, self._grown)
        return growth is not None and growth.explains(tuple(stored), global_shape(value))


def optimizer_state_mismatch(
    stored: Mapping[str, Shape], here: Mapping[str, Shape], grown: Mapping[str, Growth]
) -> str | None:
    """What of a stored optimizer state cannot be taken over, and what to do; None if all can.

    DCP loads the keys that it finds. So a state of another optimizer, or of tables cut into other columns,
    would be loaded in part, or would leave accumulators with the wrong rows.

    Args:
        stored: shapes by key of the checkpoint's state over all ranks, as `canonical_optimizer_state` has it.
        here: likewise of the optimizer that is to go on.
        grown: what `GrowingLoadPlanner` is given.
    """
    for key in sorted({*stored, *here}):
        before, after = stored.get(key), here.get(key)
        if before == after:
            continue
        growth = _growth_of(key, grown)
        if before is None or after is None or growth is None or not growth.explains(before, after):
            return _explain(key, before, after)
    return None


def _explain(key: str, before: Shape | None, after: Shape | None) -> str:
    found = f"optimizer state {key} has shape {before or 'none'} there, {after or 'none'} here"
    table = _TABLE.search(f".{key}")
    if table is None:
        return f"{found}: restore the model section, and the train section of the stage"
    if before is not None and after is not None and len(before) == len(after) == 1:
        return (
            f"table {table[1]}: row-wise Adagrad keeps one accumulator per row of each column shard, "
            f"{before[0]:,} there and {after[0]:,} here; a table that is cut into columns can neither be cut "
            f"otherwise nor grow. Restore distributed.tables.{table[1]}.sharding and the number of ranks, or "
            "start the optimizer anew from the weights"
        )
    return (
        f"{found}: restore train.table_optimizer (under adam, data_parallel tables in distributed.tables as "
        "well), or start the optimizer anew from the weights"
    )


def _growth_of(key: str, grown: Mapping[str, Growth]) -> Growth | None:
    """The growth of the parameter whose weight or optimizer state a key names."""
    return next((growth for name, growth in grown.items() if f".{name}." in f".{key}."), None)
