"""The network as one function of ids and table rows, in tensor operations that any back end knows."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hetegen_rec.config.export import DensePrecision, TablePrecision
from hetegen_rec.models.network import ClickNetwork
from hetegen_rec.scoring.layout import FieldSlots, Layout
from hetegen_rec.scoring.precision import CODINGS

_TRAINING_ONLY = ("reconstruction", "corruption")
"""Parts of a network that score nothing."""


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


class TokensOfIds(nn.Module):
    """Ids [B, S] -> tokens [B, T, D] as the training model's `TokenAssembly` makes them of its lookup.

    The tables are arguments, not weights: they stay in files of their own, which are mapped into memory,
    shared between processes, and changed without compiling anything anew.
    """

    def __init__(
        self, layout: Layout, dims: dict[str, int], projections: nn.ModuleDict, precision: TablePrecision
    ) -> None:
        """Lays out the slots.

        Args:
            layout: the slots of a row.
            dims: width of each table.
            projections: by table, to the width of the network; none for tables that have it.
            precision: how rows are stored.
        """
        super().__init__()
        self.projections = projections
        self._coding = CODINGS[precision]
        self._fields = layout.fields
        self._groups = group_slots(layout, dims)
        self._place = {
            slot: (number, group.slots.index(slot))
            for number, group in enumerate(self._groups)
            for slot in group.slots
        }

    def forward(self, ids: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Looks rows up.

        Args:
            ids: [B, S] int64, -1 where there is none.
            tables: by group, [slots] int64 first rows, and then the parts of its coding, [rows, *].

        Returns:
            Tokens [B, T, D], and [B, T] bool: whether each exists.
        """
        present = ids >= 0
        rows = self._rows(ids, present, list(tables))
        tokens, exists = [], []
        for one in self._fields:
            number, first = self._place[one.start]
            found = rows[number][:, first : first + one.stop - one.start]
            there = present[:, one.start : one.stop]
            tokens.append(self._projected(one, _mean(found, there) if one.is_bag else found))
            exists.append(there[:, :1] if one.is_bag else there)
        return torch.cat(tokens, dim=1), torch.cat(exists, dim=1)

    def _rows(self, ids: Tensor, present: Tensor, tables: list[Tensor]) -> list[Tensor]:
        """Of each group [B, slots, dim], zero where there is no id."""
        rows = []
        for group in self._groups:
            first_rows, parts = tables[0], tables[1 : 1 + len(self._coding.names)]
            tables = tables[1 + len(self._coding.names) :]
            index = ids[:, group.slots].clamp(min=0) + first_rows
            named = zip(self._coding.names, parts, strict=True)
            found = self._coding.decode({name: part[index] for name, part in named})
            rows.append(torch.where(present[:, group.slots, None], found, 0.0))
        return rows

    def _projected(self, one: FieldSlots, tokens: Tensor) -> Tensor:
        table = one.field.table_name
        projected: Tensor = self.projections[table](tokens) if table in self.projections else tokens
        return projected


class ScoringGraph(nn.Module):
    """Ids -> click probabilities, by the network of a trained model."""

    def __init__(
        self,
        network: ClickNetwork,
        layout: Layout,
        dims: dict[str, int],
        precision: TablePrecision,
        dense: DensePrecision,
    ) -> None:
        """Copies what of the network scores.

        Args:
            network: of a trained model; it stays as it is.
            layout: the slots of a row.
            dims: width of each table.
            precision: how table rows are stored.
            dense: of the weights, and of what is computed with them.
        """
        super().__init__()
        self.num_slots = layout.num_slots
        self.network = scoring_part(network)
        self.tokens = TokensOfIds(layout, dims, self.network.assembly.projections, precision)
        self._dtype = torch.bfloat16 if dense == "bf16" else torch.float32
        self.network.to(self._dtype)
        self.eval().requires_grad_(False)

    def forward(self, ids: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """ids [B, S] int64 and tables (see `TokensOfIds`) -> [B] float32 probabilities of a click."""
        tokens, present = self.tokens(ids, tables)
        return self.network.score(tokens.to(self._dtype), present).float().sigmoid()


def scoring_part(network: ClickNetwork) -> ClickNetwork:
    """A copy of a network, on the CPU, without what only training needs."""
    heavy = {name: getattr(network, name) for name in _TRAINING_ONLY if hasattr(network, name)}
    # The copy shares nothing with the original, and must not copy vocabularies' heads only to drop them.
    skipped: dict[int, object] = {id(part): None for part in heavy.values()}
    return copy.deepcopy(network, skipped).cpu()


def _mean(rows: Tensor, present: Tensor) -> Tensor:
    """[B, 1, D]: mean of those of [B, V, D] that are there."""
    count = present.sum(1, keepdim=True).clamp(min=1)
    return rows.sum(1, keepdim=True) / count[..., None]
