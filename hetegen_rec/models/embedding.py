"""Embedding tables: one EmbeddingBagCollection with a key per token, and its output as [B, T, D]."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedTensor, PoolingType

from hetegen_rec.config.schema import Schema
from hetegen_rec.data.statistics import Statistics


@dataclass(frozen=True)
class TableShape:
    """Name and size of one embedding table."""

    name: str
    num_rows: int
    dim: int


def table_shapes(schema: Schema, statistics: Statistics, model_dim: int) -> list[TableShape]:
    """The tables of a schema, in schema order; rows include the reserved ids."""
    return [
        TableShape(owner.name, statistics.table_rows(owner.name), owner.dim or model_dim)
        for owner in schema.table_owners
    ]


def build_tables(schema: Schema, shapes: list[TableShape]) -> EmbeddingBagCollection:
    """One collection on the meta device: every token is a bag, a multi-valued field a pooled one.

    Sequences are keys on the table of the field that they name, so a target item and the history
    share rows, every sharding type stays possible, and the output is dense.
    """
    configs = [
        EmbeddingBagConfig(
            name=shape.name,
            num_embeddings=shape.num_rows,
            embedding_dim=shape.dim,
            feature_names=[token.key for token in schema.tokens_on(shape.name)],
            pooling=_pooling(schema, shape.name),
        )
        for shape in shapes
    ]
    return EmbeddingBagCollection(tables=configs, device=torch.device("meta"))


def _pooling(schema: Schema, table: str) -> PoolingType:
    is_bag = schema.field(table).kind == "multi_valued"
    return PoolingType.MEAN if is_bag else PoolingType.SUM


class TokenAssembly(nn.Module):
    """Puts the looked-up rows in schema order, by name, and projects those of another width.

    The order of a KeyedTensor's values follows the sharding plan, so they are never viewed as a
    block: the same checkpoint would score differently on another number of ranks.
    """

    grouped: Tensor
    order: Tensor

    def __init__(self, schema: Schema, shapes: list[TableShape], model_dim: int) -> None:
        super().__init__()
        self.projections = nn.ModuleDict(
            {s.name: nn.Linear(s.dim, model_dim, bias=False) for s in shapes if s.dim != model_dim}
        )
        self.groups: dict[str, list[str]] = {}
        """Keys of the tokens that take the same way, by the table whose projection they need, if any."""
        for token in schema.tokens:
            table = schema.field(token.field).table_name
            self.groups.setdefault(table if table in self.projections else "", []).append(token.key)
        grouped_keys = [key for keys in self.groups.values() for key in keys]
        place_of = {token.key: place for place, token in enumerate(schema.tokens)}
        grouped = torch.tensor([place_of[key] for key in grouped_keys])
        self.register_buffer("grouped", grouped, persistent=False)
        self.register_buffer("order", grouped.argsort(), persistent=False)
        self.in_schema_order = grouped.tolist() == sorted(grouped.tolist())
        self._arrangements: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}

    def forward(
        self, looked_up: KeyedTensor, movement: Tensor | None = None, *, with_norms: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Returns tokens [B, T, D] and the squared norms [B, T] of the table rows behind them.

        Args:
            looked_up: a key per token.
            movement: [B, T] factors on the gradients of the table rows; None for no factors.
            with_norms: whether anybody reads the norms; None is returned for them otherwise.
        """
        tokens, norms = [], []
        factors = self._of_groups(movement)
        for (group, block), factor in zip(self._blocks(looked_up), factors, strict=True):
            rows = block if factor is None else scale_gradient(block, factor[..., None])
            if with_norms:
                norms.append(rows.square().sum(-1))
            tokens.append(self.projections[group](rows) if group else rows)
        return self._in_order(tokens), self._in_order(norms) if with_norms else None

    def _blocks(self, looked_up: KeyedTensor) -> Iterator[tuple[str, Tensor]]:
        """Every group with its looked-up rows [B, T_group, dim]."""
        if len(self.groups) > 1:
            rows = looked_up.to_dict()
            for group, keys in self.groups.items():
                yield group, torch.stack([rows[key] for key in keys], dim=1)
            return
        ((group, keys),) = self.groups.items()
        place_of = {key: place for place, key in enumerate(looked_up.keys())}
        places = tuple(place_of[key] for key in keys)
        values = looked_up.values()  # [B, T * dim], all of one width
        block = values.view(values.shape[0], len(places), -1)
        if list(places) != sorted(places):
            block = block.index_select(1, self._arrangement(places, values.device))
        yield group, block

    def _arrangement(self, places: tuple[int, ...], device: torch.device) -> Tensor:
        """The places as a tensor, made once: to copy them in every step is to wait for the device."""
        if torch.compiler.is_compiling():  # a traced tensor must not stay
            return torch.tensor(places, device=device)
        key = device, places
        if key not in self._arrangements:
            self._arrangements[key] = torch.tensor(places, device=device)
        return self._arrangements[key]

    def _of_groups(self, by_token: Tensor | None) -> Sequence[Tensor | None]:
        """[B, T] in schema order -> [B, T_group] of every group."""
        if by_token is None:
            return [None] * len(self.groups)
        sizes = [len(keys) for keys in self.groups.values()]
        return torch.split(by_token.index_select(1, self.grouped), sizes, dim=1)

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        """Blocks [B, T_group, ...] side by side, in schema order."""
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if self.in_schema_order:
            return whole
        return whole.index_select(1, self.order)


def scale_gradient(values: Tensor, factor: Tensor) -> Tensor:
    """The values as they are; their gradient is multiplied by the factor, which broadcasts to their shape."""
    return torch.lerp(values.detach(), values, factor.to(values.dtype))
