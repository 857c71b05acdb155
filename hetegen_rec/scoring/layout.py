"""The ids of a row as one line of integers: what every back end takes, whatever the kinds of its fields."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hetegen_rec.config.schema import Field, Schema

NO_ID = -1
"""Where a list is shorter than its slots."""


@dataclass(frozen=True)
class FieldSlots:
    """The slots of one field: as many as it keeps values."""

    field: Field
    start: int
    stop: int

    @property
    def is_bag(self) -> bool:
        """Whether its values make one token together, their mean."""
        return self.field.kind == "multi_valued"

    @property
    def num_tokens(self) -> int:
        """Tokens that the network sees of it."""
        return 1 if self.is_bag else self.stop - self.start


class Layout:
    """Where the ids of each field stand in [B, S]: fields in schema order, `list_length` slots each."""

    def __init__(self, schema: Schema, names: Collection[str] | None = None) -> None:
        """Args: names: of the fields that are laid out; default: all."""
        self.schema = schema
        self.fields: list[FieldSlots] = []
        for field in (field for field in schema.fields if names is None or field.name in names):
            self.fields.append(FieldSlots(field, self.num_slots, self.num_slots + field.list_length))

    @property
    def num_slots(self) -> int:
        """S: ids of a row."""
        return self.fields[-1].stop if self.fields else 0

    @cached_property
    def tables(self) -> list[str]:
        """[S]: the table that each slot's id indexes."""
        return [one.field.table_name for one in self.fields for _ in range(one.start, one.stop)]

    @cached_property
    def first_slots(self) -> list[int]:
        """[T]: the slot of each token, of a bag the first of its values."""
        return [slot for one in self.fields for slot in range(one.start, one.start + one.num_tokens)]

    def ids(self, columns: Mapping[str, pa.Array]) -> NDArray[np.int64]:
        """[B, S] from encoded columns (see `data.encoding`), -1 in slots without an id."""
        num_rows = len(next(iter(columns.values())))
        ids = np.full((num_rows, self.num_slots), NO_ID, np.int64)
        for one in self.fields:
            column = columns[one.field.name]
            if not one.field.is_list:
                ids[:, one.start] = column.to_numpy()
                continue
            lengths = column.value_lengths().to_numpy()
            filled = np.arange(one.stop - one.start) < lengths[:, None]
            ids[:, one.start : one.stop][filled] = column.flatten().to_numpy()
        return ids
