"""How a graph finds table rows: ids and tables -> the vectors of each field, in plain tensor operations."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hetegen_rec.config.export import TablePrecision
from hetegen_rec.scoring.layout import Layout
from hetegen_rec.scoring.precision import CODINGS


@dataclass(frozen=True)
class GroupSlots:
    """The slots whose tables have one width, and so lie in one array."""

    dim: int
    slots: list[int]


def group_slots(layout: Layout, dims: dict[str, int]) -> list[GroupSlots]:
    """The slots by the width of their tables, narrow ones first.

    Args:
        layout: the slots of a row.
        dims: width of each table.
    """
    widths = sorted({dims[table] for table in layout.tables})
    return [
        GroupSlots(width, [slot for slot, table in enumerate(layout.tables) if dims[table] == width])
        for width in widths
    ]


class GraphLookup(ABC, nn.Module):
    """Finds the vectors of a batch. Back ends are also told how rows are stored."""

    def __init__(self, layout: Layout, dims: dict[str, int]) -> None:
        """Lays out the slots.

        Args:
            layout: the slots of a row.
            dims: width of each table.
        """
        super().__init__()
        self._fields = layout.fields
        self.groups = group_slots(layout, dims)

    @abstractmethod
    def forward(self, ids: Tensor, present: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
        """Looks rows up.

        Args:
            ids: [B, S] int64, -1 where there is none.
            present: [B, S] bool: where there is one.
            tables: by group, [slots] int64 first rows, and then the arrays of the back end, [rows, *].

        Returns:
            By field, [B, tokens, dim] float32; of bags the mean of what is there, zeros where nothing is.
        """


class PlainLookup(GraphLookup):
    """Gathers rows and decodes them, in operations that any back end knows."""

    def __init__(self, layout: Layout, dims: dict[str, int], precision: TablePrecision) -> None:
        """See `GraphLookup`."""
        super().__init__(layout, dims)
        self._coding = CODINGS[precision]
        self._place = {
            slot: (number, group.slots.index(slot))
            for number, group in enumerate(self.groups)
            for slot in group.slots
        }

    def forward(self, ids: Tensor, present: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
        """See `GraphLookup.forward`."""
        rows = self._rows(ids, present, list(tables))
        fields = []
        for one in self._fields:
            number, first = self._place[one.start]
            found = rows[number][:, first : first + one.stop - one.start]
            fields.append(_mean(found, present[:, one.start : one.stop]) if one.is_bag else found)
        return fields

    def _rows(self, ids: Tensor, present: Tensor, tables: list[Tensor]) -> list[Tensor]:
        """Of each group [B, slots, dim], zero where there is no id."""
        rows = []
        for group in self.groups:
            first_rows, parts = tables[0], tables[1 : 1 + len(self._coding.names)]
            tables = tables[1 + len(self._coding.names) :]
            index = ids[:, group.slots].clamp(min=0) + first_rows
            named = zip(self._coding.names, parts, strict=True)
            found = self._coding.decode({name: part[index] for name, part in named})
            rows.append(torch.where(present[:, group.slots, None], found, 0.0))
        return rows


def _mean(rows: Tensor, present: Tensor) -> Tensor:
    """[B, 1, D]: mean of those of [B, V, D] that are there."""
    count = present.sum(1, keepdim=True).clamp(min=1)
    return rows.sum(1, keepdim=True) / count[..., None]
