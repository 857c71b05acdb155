"""The form of encoded rows: their columns and types in Arrow, and how they lie in Parquet.

An encoded table has a column for each field, under the field's name: int32 for a single value,
list<int32> for `multi_valued` (at least one id: a row without values holds [0]) and `sequence` (most
recent first, empty for a row without items). Beside them stand

    __label      float32   0 or 1
    __row_id     int64     index of the row in its split
    __timestamp  int64     in the column's own unit, 0 where missing          (if `timestamp` is set)
    __user_key   int64     a hash of the raw user value, 0 where missing      (if `user` is set)
    __user_rows  int64     training rows of that user, 0 for an unseen one    (if `user` is set)
    __item_rows  int64     training rows of that item, 0 for an unseen one    (if `item` is set)

The training rows are those of the raw value, even where it is too rare for an id; under `hash`, those
of the id that it shares.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hetegen_rec.config.schema import Schema

LABEL = "__label"
ROW_ID = "__row_id"


def encoded_schema(schema: Schema) -> pa.Schema:
    """Columns and types of an encoded table; none holds nulls."""
    ids = pa.int32()
    lists = pa.list_(pa.field("element", ids, nullable=False))
    types = {field.name: lists if field.is_list else ids for field in schema.fields}
    types |= {LABEL: pa.float32(), ROW_ID: pa.int64()}
    types |= dict.fromkeys(context_columns(schema).values(), pa.int64())
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])


def context_columns(schema: Schema) -> dict[str, str]:
    """The columns of an encoded table that only evaluation reads, by their names in `Batch.context`."""
    sources = {
        "timestamp": schema.timestamp,
        "user_key": schema.user,
        "user_rows": schema.user,
        "item_rows": schema.item,
    }
    return {name: f"__{name}" for name, source in sources.items() if source is not None}


def open_encoded_file(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A new file of encoded rows, which are decoded faster than ordinary Parquet (docs/benchmarks.md).

    Bytes of one place lie together, and those that are zero in most ids all but vanish under LZ4. So there is
    neither a dictionary to look values up in nor a slower compression to undo.
    """
    return pq.ParquetWriter(
        path,
        schema,
        compression="lz4",
        use_dictionary=False,
        use_byte_stream_split=True,
        write_page_checksum=True,
    )
