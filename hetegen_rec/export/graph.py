"""The network as one function of ids and table rows."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from hetegen_rec.config.export import Backend, DensePrecision, TablePrecision
from hetegen_rec.export.attention import attend_by_products
from hetegen_rec.export.fbgemm import FbgemmLookup
from hetegen_rec.export.lookup import GraphLookup, PlainLookup
from hetegen_rec.models.network import ClickNetwork
from hetegen_rec.scoring.layout import FieldSlots, Layout

_TRAINING_ONLY = ("reconstruction", "corruption")
"""Parts of a network that score nothing."""


_LOOKUPS: Mapping[Backend, type[PlainLookup | FbgemmLookup]] = MappingProxyType(
    {"aten": PlainLookup, "aoti": PlainLookup, "fbgemm": FbgemmLookup}
)


class TokensOfIds(nn.Module):
    """Ids [B, S] -> tokens [B, T, D] as the training model's `TokenAssembly` makes them of its lookup.

    The tables are arguments, not weights: they stay in files of their own, which are mapped into memory,
    shared between processes, and changed without compiling anything anew.
    """

    def __init__(self, layout: Layout, lookup: GraphLookup, projections: nn.ModuleDict) -> None:
        """Puts lookup and projections together.

        Args:
            layout: the slots of a row.
            lookup: of the vectors of each field.
            projections: by table, to the width of the network; none for tables that have it.
        """
        super().__init__()
        self.projections, self.lookup = projections, lookup
        self._fields = layout.fields

    def forward(self, ids: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Looks rows up.

        Args:
            ids: [B, S] int64, -1 where there is none.
            tables: by group, [slots] int64 first rows, and then the arrays of the back end, [rows, *].

        Returns:
            Tokens [B, T, D], and [B, T] bool: whether each exists.
        """
        present = ids >= 0
        tokens, exists = [], []
        for one, found in zip(self._fields, self.lookup(ids, present, tables), strict=True):
            there = present[:, one.start : one.stop]
            tokens.append(self._projected(one, found))
            exists.append(there.any(1, keepdim=True) if one.is_bag else there)
        return torch.cat(tokens, dim=1), torch.cat(exists, dim=1)

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
        backend: Backend,
    ) -> None:
        """Copies what of the network scores.

        Args:
            network: of a trained model; it stays as it is.
            layout: the slots of a row.
            dims: width of each table.
            precision: how table rows are stored.
            dense: of the weights, and of what is computed with them.
            backend: whose lookup it has.
        """
        super().__init__()
        self.layout = layout
        self.network = scoring_part(network)
        attend_by_products(self.network, len(layout.schema.tokens) + 1)  # and the label
        self._make_lookup = partial(_LOOKUPS[backend], dims=dims, precision=precision)
        self.tokens = self.tokens_of(layout)
        self._dtype = torch.bfloat16 if dense == "bf16" else torch.float32
        self.network.to(self._dtype)
        self.network.assembly.float()  # takes looked-up rows, which are float32
        self.eval().requires_grad_(False)

    def forward(self, ids: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """ids [B, S] int64 and tables (see `TokensOfIds`) -> [B] float32 probabilities of a click."""
        return self.logits(*self.tokens(ids, tables)).sigmoid()

    def logits(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Tokens [B, T, D] and whether each exists, [B, T] bool -> [B] float32 click logits."""
        return self.network.score(tokens.to(self._dtype), present).float()

    def tokens_of(self, layout: Layout) -> TokensOfIds:
        """What looks up the ids of some fields, with the lookup and the projections of this graph."""
        return TokensOfIds(layout, self._make_lookup(layout), self.network.assembly.projections)


def scoring_part(network: ClickNetwork) -> ClickNetwork:
    """A copy of a network, on the CPU, without what only training needs."""
    heavy = {name: getattr(network, name) for name in _TRAINING_ONLY if hasattr(network, name)}
    # The copy shares nothing with the original, and must not copy vocabularies' heads only to drop them.
    skipped: dict[int, object] = {id(part): None for part in heavy.values()}
    return copy.deepcopy(network, skipped).cpu()
