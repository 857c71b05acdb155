"""The feature schema: which columns a row has, what kind each is, and which tokens they become."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, PositiveInt, model_validator
from torch import nn

from hetegen_rec.config.errors import Section
from hetegen_rec.config.values import as_tuple

FieldKind: TypeAlias = Literal["id", "categorical", "numeric", "multi_valued", "sequence"]
VocabularyKind: TypeAlias = Literal["vocab", "hash", "buckets"]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MODULES = nn.ModuleDict()
_DEFAULT_LENGTHS = {"multi_valued": 16, "sequence": 20}


class ReservedId(int, Enum):
    """Ids that every table starts with. Both are learnt, neither is reconstructed."""

    MISSING = 0
    OUT_OF_VOCABULARY = 1


NUM_RESERVED_IDS = len(ReservedId)
_LARGEST_HASH_SIZE = (1 << 31) - 1 - NUM_RESERVED_IDS
"""Encoded ids are 32-bit integers."""


@dataclass(frozen=True)
class Token:
    """One position of the denoiser's input and one key of the embedding lookup.

    A field is one token, except a sequence of length L, which is L tokens on its table.
    Position 0 of a sequence is its most recent item.
    """

    key: str
    field: str
    position: int = 0


class Field(Section):
    """One field of a row."""

    name: str
    """Name used in tables, logs and reports: letters, digits and underscores."""
    kind: FieldKind
    """`id`, `categorical`, `numeric`, `multi_valued` or `sequence`."""
    column: str = ""
    """Column of the raw data; the field's name if left out."""
    vocabulary: VocabularyKind | None = None
    """How values become ids: `vocab` (exact), `hash` (salted 64-bit mix) or `buckets` (quantiles).
    Default: `buckets` for numbers, `vocab` for the rest; a sequence takes that of its table."""
    min_count: PositiveInt | None = None
    """`vocab` only: values seen less often in the training rows become out-of-vocabulary. Default 1."""
    hash_size: PositiveInt | None = None
    """`hash` only, required there: rows of the table behind the two reserved ids; at most
    2,147,483,645, as ids have 32 bits."""
    num_buckets: PositiveInt | None = None
    """`buckets` only: number of quantile buckets. Default 32."""
    table: str | None = None
    """`sequence` only, required there: the field whose table and vocabulary the items share."""
    max_length: PositiveInt | None = None
    """`sequence`: the most recent items kept, one token each (default 20); `multi_valued`: the
    first values kept (default 16)."""
    dim: PositiveInt | None = None
    """Embedding dimension of the table, a multiple of 4; narrower or wider than the model it gets a
    projection."""
    reconstruct: bool = True
    """Whether the generative objective reconstructs this field when it is masked."""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        filled = {key: value for key, value in values.items() if value is not None}
        kind = filled.get("kind")
        filled.setdefault("column", filled.get("name", ""))
        if isinstance(kind, str) and kind in _DEFAULT_LENGTHS:
            filled.setdefault("max_length", _DEFAULT_LENGTHS[kind])
        if kind == "sequence":
            return filled
        filled.setdefault("vocabulary", "buckets" if kind == "numeric" else "vocab")
        if filled["vocabulary"] == "vocab":
            filled.setdefault("min_count", 1)
        if filled["vocabulary"] == "buckets":
            filled.setdefault("num_buckets", 32)
        return filled

    @model_validator(mode="after")
    def _check(self) -> "Field":
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name {self.name!r} may hold only letters, digits and underscores and must not "
                "start with a digit; put the raw column's name under `column`"
            )
        if self.name.startswith("__"):
            raise ValueError(
                f"name {self.name!r} must not start with `__`, which marks encoded context columns"
            )
        if hasattr(_MODULES, self.name):
            raise ValueError(
                f"name {self.name!r} means something else to torch modules, which hold a field's table under "
                f"its name; choose another, such as `name: {self.name}_`, and keep `column: {self.column}`"
            )
        if self.kind == "sequence":
            self._reject("is that of the field it names under `table`", "vocabulary", "min_count")
            self._reject("belongs to the field named under `table`", "hash_size", "num_buckets", "dim")
            if self.table is None:
                raise ValueError("a sequence needs `table`: the name of the field its items are of")
            return self
        self._reject("is for kind `sequence` only", "table")
        if self.kind != "multi_valued":
            self._reject("is for kinds `sequence` and `multi_valued` only", "max_length")
        if self.dim is not None and self.dim % 4:
            raise ValueError(f"`dim: {self.dim}` must be a multiple of 4, which the CUDA kernels need")
        if self.vocabulary == "buckets" and self.kind != "numeric":
            raise ValueError("`vocabulary: buckets` needs kind `numeric`; use `vocab` or `hash`")
        if self.vocabulary != "vocab":
            self._reject("is for `vocabulary: vocab` only", "min_count")
        if self.vocabulary != "buckets":
            self._reject("is for `vocabulary: buckets` only", "num_buckets")
        self._check_hash_size()
        return self

    def _check_hash_size(self) -> None:
        if self.vocabulary == "hash" and self.hash_size is None:
            raise ValueError("`vocabulary: hash` needs `hash_size`: the rows of the table")
        if self.vocabulary != "hash":
            self._reject("is for `vocabulary: hash` only", "hash_size")
        if self.hash_size is not None and self.hash_size > _LARGEST_HASH_SIZE:
            raise ValueError(
                f"`hash_size: {self.hash_size}` must be at most {_LARGEST_HASH_SIZE}, as ids have 32 bits"
            )

    def _reject(self, reason: str, *keys: str) -> None:
        for key in keys:
            if getattr(self, key) is not None:
                raise ValueError(f"`{key}` {reason}; remove it from field {self.name!r}")

    @property
    def is_list(self) -> bool:
        """Whether a row holds a list of values."""
        return self.kind in _DEFAULT_LENGTHS

    @property
    def list_length(self) -> int:
        """The most values of this field that a row keeps: 1 unless it is a list."""
        return self.max_length or 1

    @property
    def table_name(self) -> str:
        """The embedding table (and vocabulary) that this field's ids index."""
        return self.table or self.name


class Schema(Section):
    """What a row of the data holds."""

    label: str
    """Column with the click: 0 or 1."""
    timestamp: str | None = None
    """Optional column with the event time; kept beside the row for slices and predictions."""
    user: str | None = None
    """Optional field whose raw value groups rows for GAUC and the cold-start slices."""
    item: str | None = None
    """Optional field whose raw value defines the long-tail slice."""
    fields: Annotated[tuple[Field, ...], BeforeValidator(as_tuple)]

    @model_validator(mode="after")
    def _check(self) -> "Schema":
        if not self.fields:
            raise ValueError("`fields` is empty; describe at least one field")
        names = [field.name for field in self.fields]
        _reject_repeats("field name", names)
        by_name = {field.name: field for field in self.fields}
        for field in self.fields:
            if field.column == self.label:
                raise ValueError(f"field {field.name!r} reads the label column {self.label!r}")
            if field.table is None:
                continue
            owner = by_name.get(field.table)
            if owner is None or owner.kind not in ("id", "categorical"):
                raise ValueError(
                    f"sequence {field.name!r} shares table {field.table!r}, which must be an `id` "
                    f"or `categorical` field of this schema (fields: {', '.join(names)})"
                )
        for role in ("user", "item"):
            name = getattr(self, role)
            if name is None:
                continue
            if name not in by_name or by_name[name].kind not in ("id", "categorical"):
                raise ValueError(
                    f"`{role}: {name}` must name an `id` or `categorical` field (fields: {', '.join(names)})"
                )
        return self

    def field(self, name: str) -> Field:
        """The field of that name; KeyError if there is none."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Field]:
        return {field.name: field for field in self.fields}

    @cached_property
    def field_names(self) -> tuple[str, ...]:
        """Names of the fields, in schema order."""
        return tuple(field.name for field in self.fields)

    @cached_property
    def tokens(self) -> tuple[Token, ...]:
        """The T tokens of a row, in schema order; a sequence's positions are consecutive."""
        return tuple(token for field in self.fields for token in _tokens_of(field))

    @cached_property
    def table_owners(self) -> tuple[Field, ...]:
        """The fields that own an embedding table: all but the sequences."""
        return tuple(field for field in self.fields if field.kind != "sequence")

    def span(self, name: str) -> tuple[int, int]:
        """Index of a field's first token and of the one behind its last."""
        places = [place for place, token in enumerate(self.tokens) if token.field == name]
        return places[0], places[-1] + 1

    def tokens_on(self, table: str) -> tuple[Token, ...]:
        """The tokens that look up rows of this table."""
        return tuple(t for t in self.tokens if self.field(t.field).table_name == table)


def _tokens_of(field: Field) -> list[Token]:
    if field.kind != "sequence":
        return [Token(field.name, field.name)]
    # Neither a letter of names nor "@", by which TorchRec tells a key from its table.
    return [Token(f"{field.name}:{i}", field.name, i) for i in range(field.list_length)]


def _reject_repeats(what: str, names: Sequence[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what} {repeated[0]!r} stands twice; names must differ")
