"""Raw rows to rows of integer ids, vectorised: the same code for `prepare` and on-the-fly reading."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hetegen_rec.config.schema import Field, ReservedId, Schema
from hetegen_rec.data.columns import (
    FieldValues,
    ValueType,
    field_values,
    labels,
    require_columns,
    timestamps,
)
from hetegen_rec.data.encoded_rows import LABEL, ROW_ID, encoded_schema
from hetegen_rec.data.errors import BadRowsError
from hetegen_rec.data.hashing import salt_of
from hetegen_rec.data.raw import column_keys
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.data.vocabulary import (
    BucketVocabulary,
    ExactVocabulary,
    HashVocabulary,
    Vocabulary,
    hash_values,
)

VOCABULARY_DIR = "vocabulary"
_USER_KEY_SALT = salt_of("__user_key")


def required_columns(schema: Schema) -> list[str]:
    """The raw columns that encoding reads."""
    return list(column_keys(schema))


def vocabulary_path(prepared_dir: str | Path, table: str) -> Path:
    """Where the vocabulary of a `vocab` table is kept."""
    return Path(prepared_dir) / VOCABULARY_DIR / f"{table}.parquet"


class FieldEncoder:
    """Encodes the fields of raw rows: the one way from values to ids, in training and in scoring."""

    def __init__(
        self,
        schema: Schema,
        vocabularies: Mapping[str, Vocabulary],
        value_types: Mapping[str, ValueType],
    ) -> None:
        """Takes vocabularies and the types of the training values, both by table."""
        self._schema, self._vocabularies, self._value_types = schema, dict(vocabularies), dict(value_types)

    def columns(
        self, table: pa.Table, first_row: int, where: str, fields: Sequence[Field] | None = None
    ) -> dict[str, pa.Array]:
        """The id columns of fields, for rows that are only scored.

        Args:
            table: the columns of `required_columns`; others are ignored.
            first_row: index of the first row, for errors.
            where: what the rows are of, for errors.
            fields: of the schema; default: all.

        Raises:
            BadRowsError: a column is missing, or its type or a value is wrong.
        """
        fields = self._schema.fields if fields is None else fields
        require_columns(table, self._schema, where, labelled=False, fields=fields)
        return {
            field.name: self.column(field, field_values(table, field, first_row, where), where)
            for field in fields
        }

    def column(self, field: Field, found: FieldValues, where: str) -> pa.Array:
        """The id column of one field.

        Raises:
            BadRowsError: the values are of another type than those of the training rows.
        """
        self._require_type(field, found, where)
        return _id_column(field, found, self.lookup(field, found.values))

    def lookup(self, field: Field, values: pa.Array) -> npt.NDArray[np.int32]:
        """[len(values)] ids of values without nulls."""
        if pa.types.is_null(values.type):
            return np.empty(0, np.int32)
        return self._vocabularies[field.table_name].lookup(values)

    def _require_type(self, field: Field, found: FieldValues, where: str) -> None:
        """Values of another type than in training would all be unknown, and silently so."""
        expected = self._value_types[field.table_name]
        if "none" not in (expected, found.value_type) and expected != found.value_type:
            raise BadRowsError(
                f"{where}: column {field.column!r} of {field.kind} field {field.name!r} holds "
                f"{found.value_type} values, but the training rows hold {expected} values; give it values of "
                "that type"
            )


class Encoder:
    """Encodes raw tables, with labels and what evaluation reads beside the fields.

    Args:
        schema: the schema.
        statistics: of the training rows, under this schema.
        exact: the vocabularies of the tables with `vocabulary: vocab`.
    """

    def __init__(self, schema: Schema, statistics: Statistics, exact: Mapping[str, ExactVocabulary]) -> None:
        self._schema, self._form = schema, encoded_schema(schema)
        self._statistics = statistics
        self._exact = dict(exact)
        vocabularies = {field.name: self._vocabulary(field) for field in schema.table_owners}
        types = {name: statistics.fields[name].value_type for name in vocabularies}
        self._fields = FieldEncoder(schema, vocabularies, types)

    @classmethod
    def load(cls, prepared_dir: str | Path, schema: Schema) -> "Encoder":
        """An encoder from what `prepare` wrote for this schema."""
        exact = {
            field.name: ExactVocabulary.load(vocabulary_path(prepared_dir, field.name))
            for field in schema.table_owners
            if field.vocabulary == "vocab"
        }
        return cls(schema, Statistics.load(prepared_dir), exact)

    def encode(self, table: pa.Table, first_row: int, where: str, *, labelled: bool = True) -> pa.Table:
        """Encodes the rows of a raw table.

        Args:
            table: the columns of `required_columns`; others are ignored.
            first_row: index of the first row in the split.
            where: file and row group, for errors.
            labelled: False for rows to be scored only: label and timestamp are not read, and are 0.

        Raises:
            BadRowsError: a column is missing, its type or a value is wrong, or a label is not 0 or 1.
        """
        require_columns(table, self._schema, where, labelled=labelled)
        columns: dict[str, pa.Array] = {}
        context: dict[str, npt.NDArray[np.int64]] = {}
        for field in self._schema.fields:
            found = field_values(table, field, first_row, where)
            columns[field.name] = self._fields.column(field, found, where)
            context.update(self._context(field, found))
        clicks = (
            labels(table, self._schema, first_row, where) if labelled else np.zeros(len(table), np.float32)
        )
        columns[LABEL] = pa.array(clicks)
        columns[ROW_ID] = pa.array(np.arange(first_row, first_row + len(table)))
        if self._schema.timestamp:
            times = timestamps(table, self._schema, where) if labelled else np.zeros(len(table), np.int64)
            columns["__timestamp"] = pa.array(times)
        columns |= {name: pa.array(values) for name, values in context.items()}
        return pa.table(columns).select(self._form.names).cast(self._form)

    def _vocabulary(self, field: Field) -> Vocabulary:
        if field.vocabulary == "vocab":
            return self._exact[field.name]
        if field.vocabulary == "hash":
            return HashVocabulary(field.name, field.hash_size or 0)
        edges = self._statistics.fields[field.name].bucket_edges
        return BucketVocabulary(np.empty(0) if edges is None else edges)

    def _context(self, field: Field, found: FieldValues) -> dict[str, npt.NDArray[np.int64]]:
        """The columns for evaluation that come from this field."""
        context = {}
        if field.name == self._schema.user:
            keys = hash_values(found.values, _USER_KEY_SALT).view(np.int64)
            context["__user_key"] = _by_row(found, keys)
            context["__user_rows"] = _by_row(found, self._training_rows(field, found.values))
        if field.name == self._schema.item:
            context["__item_rows"] = _by_row(found, self._training_rows(field, found.values))
        return context

    def _training_rows(self, field: Field, values: pa.Array) -> npt.NDArray[np.int64]:
        if pa.types.is_null(values.type):
            return np.empty(0, np.int64)
        exact = self._exact.get(field.name)
        if exact is not None:
            return exact.rows_of(exact.positions(values))
        counts = self._statistics.fields[field.name].counts
        return counts[self._fields.lookup(field, values)]


def _by_row(found: FieldValues, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[B]: the values at the rows that have one, 0 elsewhere."""
    rows = np.zeros(len(found.lengths), np.int64)
    rows[found.lengths == 1] = values
    return rows


def _id_column(field: Field, found: FieldValues, ids: npt.NDArray[np.int32]) -> pa.Array:
    if not field.is_list:
        return pa.array(_by_row(found, ids.astype(np.int64)).astype(np.int32))
    lengths = found.lengths
    if field.kind == "multi_valued":
        empty = lengths == 0
        ends = np.cumsum(lengths)
        ids = np.insert(ids, ends[empty], int(ReservedId.MISSING))
        lengths = np.maximum(lengths, 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids.astype(np.int32)))
