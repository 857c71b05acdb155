"""The graphs beside the plain one, for callers that want more than the probability of encoded rows."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.export import ExportConfig
from hetegen_rec.config.schema import NUM_RESERVED_IDS, Field, ReservedId, Schema
from hetegen_rec.data.hashing import hash_bucket_torch, mix64_torch, salt_of
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.export.compile import EXAMPLE_ROWS, ROWS, Part, free_sizes
from hetegen_rec.export.graph import ScoringGraph
from hetegen_rec.scoring.layout import NO_ID, FieldSlots, Layout
from hetegen_rec.scoring.manifest import PartName


def parts_of(
    graph: ScoringGraph, tables: list[Tensor], config: ExportConfig, statistics: Statistics
) -> dict[PartName, Part]:
    """The graphs that the configuration asks for.

    Args:
        graph: the plain one of a back end.
        tables: its arguments behind the ids.
        config: that `check_parts` found no fault with.
        statistics: of the training rows.
    """
    parts: dict[PartName, Part] = {}
    layout, free, of_tables = graph.layout, {0: ROWS}, free_sizes(tables)
    if set(config.strategies) - {"plain"}:
        ids = torch.zeros(EXAMPLE_ROWS, layout.num_slots, dtype=torch.int64)
        parts["tokens"] = Part(graph.tokens, (ids, tables), (free, of_tables))
        with torch.no_grad():
            parts["logits"] = Part(LogitsGraph(graph), graph.tokens(ids, tables), (free, free))
    if config.shared_fields:
        candidates = CandidatesGraph(graph, config.shared_fields)
        shared = torch.zeros(1, candidates.shared.layout.num_slots, dtype=torch.int64)
        others = torch.zeros(EXAMPLE_ROWS, candidates.others.layout.num_slots, dtype=torch.int64)
        parts["candidates"] = Part(candidates, (shared, others, tables), (None, free, of_tables))
    if config.raw_integers:
        values = torch.zeros(EXAMPLE_ROWS, layout.num_slots, dtype=torch.int64)
        arguments = (values, torch.ones_like(values, dtype=torch.bool), tables)
        parts["integers"] = Part(IntegersGraph(graph, statistics), arguments, (free, free, of_tables))
    return parts


def check_parts(config: ExportConfig, schema: Schema, statistics: Statistics) -> None:
    """Refuses graphs that these fields cannot have.

    Raises:
        ConfigError: they cannot; the message names the fields.
    """
    if set(config.shared_fields) == set(schema.field_names):
        raise ConfigError(
            "export.shared_fields: these are all fields, so the rows of a request would hold nothing; leave "
            "out those of the candidate items"
        )
    shared = {field.column for field in schema.fields if field.name in config.shared_fields}
    for field in schema.fields:
        if field.column in shared and field.name not in config.shared_fields:
            raise ConfigError(
                f"export.shared_fields: column {field.column!r} of a shared field is also that of field "
                f"{field.name!r}, which is not shared; share both, or give one a column of its own"
            )
    if config.raw_integers:
        wrong = {field.name: _no_integers(field, schema, statistics) for field in schema.fields}
        named = [f"{name} ({reason})" for name, reason in wrong.items() if reason]
        if named:
            raise ConfigError(
                "export.raw_integers: true takes fields that are hashed integers or numeric; these are not: "
                f"{', '.join(named)}. Set it to false, or train with `vocabulary: hash` on integers"
            )


def _no_integers(field: Field, schema: Schema, statistics: Statistics) -> str | None:
    """Why a graph cannot make the ids of a field; None if it can."""
    owner = schema.field(field.table_name)
    if owner.vocabulary == "vocab":
        return "vocabulary: vocab"
    if statistics.fields[owner.name].value_type == "string":
        return "strings"
    return None


class LogitsGraph(nn.Module):
    """The network without its lookup, for strategies that run it several times."""

    def __init__(self, graph: ScoringGraph) -> None:
        super().__init__()
        self.plain = graph

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Tokens [B, T, D] and whether each exists, [B, T] bool -> [B] float32 click logits."""
        return self.plain.logits(tokens, present)


class CandidatesGraph(nn.Module):
    """One user, many candidate items: what they share is looked up and projected once."""

    def __init__(self, graph: ScoringGraph, shared_fields: Sequence[str]) -> None:
        """Args: shared_fields: those of the user's side, not all of the schema."""
        super().__init__()
        self.plain = graph
        names = graph.layout.schema.field_names
        self.shared = _Side(graph, [name for name in names if name in shared_fields])
        self.others = _Side(graph, [name for name in names if name not in shared_fields])
        by_side = [*self.shared.slots_of_tokens, *self.others.slots_of_tokens]
        self._order = [by_side.index(slot) for slot in graph.layout.first_slots]

    def forward(self, shared: Tensor, others: Tensor, tables: list[Tensor]) -> Tensor:
        """Looks both sides up, and scores the rows that they make.

        Args:
            shared: [1, S_shared] int64 ids.
            others: [B, S_others] int64 ids.
            tables: as those of the plain graph.

        Returns:
            [B] float32 probabilities of a click.
        """
        once, is_there_once = self.shared(shared, tables)
        tokens, is_there = self.others(others, tables)
        num_rows = others.shape[0]
        tokens = torch.cat([once.expand(num_rows, -1, -1), tokens], dim=1)[:, self._order]
        present = torch.cat([is_there_once.expand(num_rows, -1), is_there], dim=1)[:, self._order]
        return self.plain.logits(tokens, present).sigmoid()


class _Side(nn.Module):
    """Ids of some fields [B, S_side] -> their tokens, with the tables of the plain graph."""

    def __init__(self, graph: ScoringGraph, names: Sequence[str]) -> None:
        super().__init__()
        whole = graph.layout
        self.layout = Layout(whole.schema, names)
        self.tokens = graph.tokens_of(self.layout)
        chosen = [one for one in whole.fields if one.field.name in names]
        slots = [slot for one in chosen for slot in range(one.start, one.stop)]
        self.slots_of_tokens = [slot for slot in whole.first_slots if slot in slots]
        self._places: list[tuple[int, list[int]]] = []
        self._num_groups = len(graph.tokens.lookup.groups)
        for number, group in enumerate(graph.tokens.lookup.groups):
            places = [place for place, slot in enumerate(group.slots) if slot in slots]
            if places:
                self._places.append((number, places))

    def forward(self, ids: Tensor, tables: list[Tensor]) -> tuple[Tensor, Tensor]:
        per_group = len(tables) // self._num_groups
        own: list[Tensor] = []
        for number, places in self._places:
            first_rows, *arrays = tables[number * per_group : (number + 1) * per_group]
            own += [first_rows[places], *arrays]
        return self.tokens(ids, own)


class IntegersGraph(nn.Module):
    """Raw integers -> click probabilities: hashes and buckets them as `data.vocabulary` does."""

    def __init__(self, graph: ScoringGraph, statistics: Statistics) -> None:
        """Takes the edges of numeric fields from the statistics."""
        super().__init__()
        self.plain = graph
        self._fields = graph.layout.fields
        schema = graph.layout.schema
        self._owners = {field.name: schema.field(field.table_name) for field in schema.fields}
        for owner in self._owners.values():
            if owner.vocabulary == "buckets":
                edges = statistics.fields[owner.name].bucket_edges
                tensor = torch.empty(0) if edges is None else torch.from_numpy(edges)
                self.register_buffer(_edges_of(owner), tensor.double())

    def forward(self, values: Tensor, given: Tensor, tables: list[Tensor]) -> Tensor:
        """Encodes and scores rows.

        Args:
            values: [B, S] int64 in the slots of the layout: a list's values from its first slot on, of a
                sequence the most recent first. Unsigned integers by their bits; numeric fields take whole
                numbers.
            given: [B, S] bool; False where there is no value.
            tables: as those of the plain graph.

        Returns:
            [B] float32 probabilities of a click.
        """
        ids = torch.cat([self._ids(one, values, given) for one in self._fields], dim=1)
        probabilities: Tensor = self.plain(ids, tables)
        return probabilities

    def _ids(self, one: FieldSlots, values: Tensor, given: Tensor) -> Tensor:
        """[B, slots] of one field, of values and presence of all."""
        values, given = values[:, one.start : one.stop], given[:, one.start : one.stop]
        owner = self._owners[one.field.name]
        if owner.vocabulary == "buckets":
            edges = self.get_buffer(_edges_of(owner))
            places = torch.searchsorted(edges, values.double().contiguous(), right=True)
        else:
            assert owner.hash_size is not None  # checked by the schema
            places = hash_bucket_torch(mix64_torch(values, salt_of(owner.name)), owner.hash_size)
        ids = torch.where(given, places + NUM_RESERVED_IDS, NO_ID)
        if one.field.kind == "sequence":
            return ids
        # Where a single value or a whole set is missing, its first slot says so.
        missing = ~given.any(1, keepdim=True)
        return torch.cat([torch.where(missing, int(ReservedId.MISSING), ids[:, :1]), ids[:, 1:]], dim=1)


def _edges_of(owner: Field) -> str:
    return f"edges_of_{owner.name}"
