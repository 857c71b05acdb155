"""From the counts of a table's fields to its vocabulary and their statistics: all ids new, or some kept."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hetegen_rec.config.schema import NUM_RESERVED_IDS, Field, ReservedId, Schema
from hetegen_rec.data.accumulators import Counter, FieldAccumulator, HashCounter, Histogram, ValueCounter
from hetegen_rec.data.columns import ValueType
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.statistics import FieldStatistics, entropy_of
from hetegen_rec.data.vocabulary import (
    BucketVocabulary,
    ExactVocabulary,
    HashVocabulary,
    TableIdentity,
    Vocabulary,
)


@dataclass(frozen=True)
class KeptTable:
    """A table of older prepared data whose ids stay."""

    directory: str
    """Where the older data are."""
    owner: FieldStatistics
    """The older statistics of the field that owns the table."""
    identity: TableIdentity
    """Which value each of its ids stands for."""
    values: pa.Array | None
    """`vocab`: the values that have ids, in order of id."""


def summarise_table(
    schema: Schema,
    table: str,
    counted: Mapping[str, FieldAccumulator],
    kept: KeptTable | None = None,
) -> tuple[ExactVocabulary | None, list[FieldStatistics]]:
    """The vocabulary of a table and the statistics of the fields on it.

    A vocabulary holds the values of the field that owns the table and of the sequences that share it,
    and `min_count` is held against their counts together: an item that was only ever part of a
    history deserves a row too.

    Args:
        schema: the schema.
        table: the field that owns the table.
        counted: accumulators of the fields on the table, merged over all ranks.
        kept: an older table, of the same definition, whose exact values keep their ids and whose buckets
            keep their edges; counts are those of the new rows. Beyond MAX_CELLS distinct numbers the cells
            that such an edge cuts are counted as a whole.

    Raises:
        DataError: fields on the table, or the older values, are of different types.
    """
    _require_one_type(schema, table, counted)
    if kept is not None:
        _require_type_of(kept, schema, counted)
    owner = schema.field(table)
    vocabulary = _vocabulary_of(owner, counted, kept)
    identity = TableIdentity(definition_of(owner), vocabulary.num_ids, vocabulary.digest)
    if kept is not None:
        identity = identity.after(kept.identity)
    edges = vocabulary.edges if isinstance(vocabulary, BucketVocabulary) else None
    checksum = vocabulary.checksum if isinstance(vocabulary, ExactVocabulary) else ""
    value_type = _value_type(counted, kept)
    statistics = []
    for name, field in counted.items():
        counts = _counts_by_id(vocabulary, field.counter)
        if name == table:  # an empty sequence is an empty bag, anything else missing looks up row 0
            counts[ReservedId.MISSING] = field.num_missing
        statistics.append(
            FieldStatistics(
                name=name,
                num_values=field.num_values,
                num_missing=field.num_missing,
                num_out_of_vocabulary=int(counts[ReservedId.OUT_OF_VOCABULARY]),
                cardinality=_cardinality(field.counter),
                num_ids=vocabulary.num_ids,
                entropy=entropy_of(counts[NUM_RESERVED_IDS:]),
                counts=counts,
                bucket_edges=edges,
                table=table,
                value_type=value_type,
                vocabulary_checksum=checksum,
                identity=identity,
            )
        )
    return vocabulary if isinstance(vocabulary, ExactVocabulary) else None, statistics


def definition_of(owner: Field) -> str:
    """How a field that owns a table makes ids of values; `min_count` bears on new ids only."""
    if owner.vocabulary == "hash":
        return f"vocabulary hash, hash_size {owner.hash_size}"
    if owner.vocabulary == "buckets":
        return f"vocabulary buckets, num_buckets {owner.num_buckets}"
    return "vocabulary vocab"


def _require_one_type(schema: Schema, table: str, counted: Mapping[str, FieldAccumulator]) -> None:
    types = {name: field.value_type for name, field in counted.items() if field.value_type != "none"}
    if len(set(types.values())) > 1:
        found = ", ".join(f"{schema.field(name).column!r} {kind}" for name, kind in types.items())
        raise DataError(
            f"fields that share table {table!r} hold values of different types ({found}); write them as one"
        )


def _require_type_of(kept: KeptTable, schema: Schema, counted: Mapping[str, FieldAccumulator]) -> None:
    expected = kept.owner.value_type
    for name, field in counted.items():
        if "none" not in (expected, field.value_type) and expected != field.value_type:
            raise DataError(
                f"column {schema.field(name).column!r} of field {name!r} holds {field.value_type} values, "
                f"but `data.keep_ids_of: {kept.directory}` was prepared from {expected} values; write both "
                "as one type"
            )


def _vocabulary_of(
    owner: Field, counted: Mapping[str, FieldAccumulator], kept: KeptTable | None
) -> Vocabulary:
    if owner.vocabulary == "hash":
        return HashVocabulary(owner.name, owner.hash_size or 0)
    if owner.vocabulary == "buckets":
        if kept is not None and kept.owner.bucket_edges is not None:
            return BucketVocabulary(kept.owner.bucket_edges)
        histogram = counted[owner.name].counter
        assert isinstance(histogram, Histogram)
        return BucketVocabulary(histogram.edges(owner.num_buckets or 1))
    tables = {name: _values_of(field.counter) for name, field in counted.items()}
    values = None if kept is None else kept.values
    return ExactVocabulary.build(tables, owner.name, owner.min_count or 1, values)


def _values_of(counter: Counter) -> pa.Table:
    assert isinstance(counter, ValueCounter)
    return counter.table


def _counts_by_id(vocabulary: Vocabulary, counter: Counter) -> npt.NDArray[np.int64]:
    """[num_ids] occurrences of each id among the values that were counted."""
    if isinstance(counter, HashCounter):
        return counter.counts
    if isinstance(counter, Histogram):
        values, occurrences = pa.array(counter.starts), counter.counts
    else:
        table = _values_of(counter)
        values, occurrences = table["value"].combine_chunks(), table["count"].to_numpy()
    counts = np.zeros(vocabulary.num_ids, np.int64)
    np.add.at(counts, vocabulary.lookup(values), occurrences)
    return counts


def _value_type(counted: Mapping[str, FieldAccumulator], kept: KeptTable | None) -> ValueType:
    """That of the values seen in any field on the table, or of the older ones if there were none."""
    seen = (field.value_type for field in counted.values() if field.value_type != "none")
    return next(seen, "none" if kept is None else kept.owner.value_type)


def _cardinality(counter: Counter) -> int:
    if isinstance(counter, HashCounter | Histogram):
        return counter.distinct.estimate
    return len(_values_of(counter))
