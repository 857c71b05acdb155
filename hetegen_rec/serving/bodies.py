"""Bodies of requests as rows, and probabilities as bodies of answers: JSON and Arrow IPC streams.

Bodies come from strangers. What is read of one must stay in proportion to its bytes: compressed streams and
Arrow types in which one value can stand for many places are refused.
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hetegen_rec.scoring.rows import Row

JSON = "application/json"
ARROW_STREAM = "application/vnd.apache.arrow.stream"

Decoded: TypeAlias = "list[Row] | pa.Table"
_KEYS = ("rows", "shared")
_MOST_SHARED_BYTES = 64 << 20
"""Of shared columns, written out for every row."""


class BodyError(ValueError):
    """A body cannot be used; the message is for the caller."""

    def __init__(self, status: int, message: str) -> None:
        """Takes the HTTP status of the answer."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class BodyFormat:
    """How one content type is read and answered."""

    media_type: str
    decode: Callable[[bytes, Sequence[str], int], Decoded]
    """Body, the columns that are read, the most rows that it may have -> rows. Raises `BodyError`."""
    encode: Callable[[NDArray[np.float32]], bytes]
    """[N] probabilities -> body."""


def format_of(content_type: str | None) -> BodyFormat:
    """The format of a Content-Type header.

    Raises:
        BodyError: 415, there is none of that type.
    """
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type not in FORMATS:
        raise BodyError(415, f"Content-Type is {media_type or 'missing'}; send {' or '.join(FORMATS)}")
    return FORMATS[media_type]


def _decode_json(body: bytes, columns: Sequence[str], most_rows: int) -> list[Row]:
    try:
        return _rows_of(json.loads(body), columns, most_rows)
    except BodyError:
        raise
    except RecursionError as error:
        raise BodyError(400, "the body is no JSON that can be read: it is nested too deeply") from error
    except ValueError as error:  # of syntax, of UTF-8, and of numbers with thousands of digits
        raise BodyError(400, f"the body is no JSON: {error}") from error


def _rows_of(content: object, columns: Sequence[str], most_rows: int) -> list[Row]:
    """The rows of a document, each with the columns that they share."""
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise BodyError(400, 'the body must be {"rows": [{column: value, ...}, ...]}')
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        raise BodyError(400, f"the body has the key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    rows, shared = content["rows"], content.get("shared", {})
    _require_few(len(rows), most_rows)  # before any is looked at: millions of empty rows fit in a body
    if not isinstance(shared, dict):
        raise BodyError(400, "`shared` must be an object of columns, which hold for every row")
    _require_flat(shared, columns, "`shared`")
    for place, row in enumerate(rows):
        if not isinstance(row, dict):
            raise BodyError(400, f"row {place} is no object of columns")
        twice = shared.keys() & row.keys()
        if twice:
            raise BodyError(400, f"row {place} has the column {min(twice)!r}, which stands under `shared`")
        _require_flat(row, columns, f"row {place}")
    if not shared:
        return rows
    if len(json.dumps(shared)) * len(rows) > _MOST_SHARED_BYTES:
        raise BodyError(
            413,
            f"`shared` for each of {len(rows):,} rows is more than {_MOST_SHARED_BYTES:,} bytes; send fewer "
            "rows",
        )
    return [{**shared, **row} for row in rows]


def _require_few(num_rows: int, most_rows: int) -> None:
    if num_rows > most_rows:
        raise BodyError(413, f"{num_rows:,} rows; send at most {most_rows:,} at a time")


def _require_flat(row: Row, columns: Sequence[str], where: str) -> None:
    """Raises BodyError for values within values: Arrow takes seconds for deep ones, only to refuse them."""
    for column in columns:
        value = row.get(column)
        if isinstance(value, dict) or (isinstance(value, list) and any(map(_is_nested, value))):
            raise BodyError(422, f"{where}: column {column!r} is nested; send a value or a list of values")


def _is_nested(value: object) -> bool:
    return isinstance(value, list | dict)


def _encode_json(probabilities: NDArray[np.float32]) -> bytes:
    return json.dumps({"probabilities": probabilities.tolist()}).encode()


def _decode_arrow(body: bytes, columns: Sequence[str], most_rows: int) -> pa.Table:
    try:
        _refuse_expansion(body)
        table = pa.ipc.open_stream(body).read_all()
        _require_few(len(table), most_rows)
        table = _select(table, columns)
        table.validate(full=True)
        _require_size(table, most_values=8 * len(body))
    except BodyError:
        raise
    except (pa.ArrowException, struct.error, OSError, ValueError) as error:  # whatever damage leads to
        raise BodyError(400, f"the body is no Arrow IPC stream: {error}") from error
    return table


def _encode_arrow(probabilities: NDArray[np.float32]) -> bytes:
    batch = pa.record_batch({"probability": pa.array(probabilities, pa.float32())})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


FORMATS: Mapping[str, BodyFormat] = MappingProxyType(
    {
        JSON: BodyFormat(JSON, _decode_json, _encode_json),
        ARROW_STREAM: BodyFormat(ARROW_STREAM, _decode_arrow, _encode_arrow),
    }
)


def _refuse_expansion(body: bytes) -> None:
    """Raises BodyError if parts of a stream would be larger in memory than they are in the body."""
    for message in pa.ipc.MessageReader.open_stream(body):
        if message.type == "dictionary":
            raise BodyError(422, "a column is dictionary-encoded; cast it to plain values")
        if message.type == "record batch" and _is_compressed(message.metadata.to_pybytes()):
            raise BodyError(422, "the stream is compressed; write it without compression")


def _is_compressed(metadata: bytes) -> bool:
    """Whether a record batch message names a compression of its buffers.

    PyArrow decompresses without telling. The message is a FlatBuffer (Message.fbs of the Arrow format): the
    third field of its root is the batch, whose fourth field is the compression.
    """
    batch = _field(metadata, _follow(metadata, 0), 2)
    return batch is not None and _field(metadata, _follow(metadata, batch), 3) is not None


def _follow(buffer: bytes, place: int) -> int:
    """Where the offset at a place leads."""
    offset: int = struct.unpack_from("<I", buffer, place)[0]
    return place + offset


def _field(buffer: bytes, table: int, number: int) -> int | None:
    """The place of a field of a FlatBuffer table; None if it was left out."""
    layout = table - struct.unpack_from("<i", buffer, table)[0]
    size = struct.unpack_from("<H", buffer, layout)[0]
    entry = 4 + 2 * number
    offset = struct.unpack_from("<H", buffer, layout + entry)[0] if entry < size else 0
    return table + offset if offset else None


def _select(table: pa.Table, columns: Sequence[str]) -> pa.Table:
    """The columns that are read and are there, of types whose size the body bounds."""
    names = [name for name in columns if name in table.column_names]
    for name in names:
        if table.column_names.count(name) > 1:
            raise BodyError(400, f"column {name!r} stands twice in the stream")
        _require_plain(name, table.schema.field(name).type)
    return table.select(names)


def _require_size(table: pa.Table, most_values: int) -> None:
    """Nulls take no room in the body, so its length does not bound how many stand in lists."""
    for name in table.column_names:
        if _is_list(table.schema.field(name).type):
            num_values = sum(len(chunk.values) for chunk in table[name].chunks)
            if num_values > most_values:
                raise BodyError(422, f"column {name!r} has more values in its lists than the body has bits")


def _require_plain(name: str, kind: pa.DataType) -> None:
    value = kind.value_type if _is_list(kind) else kind
    checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
    if not any(check(value) for check in (*checks, *texts)):
        raise BodyError(
            422, f"column {name!r} is of type {kind}; send numbers, booleans or strings, or lists of them"
        )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))
