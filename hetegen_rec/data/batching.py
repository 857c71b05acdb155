"""Encoded rows (an Arrow table of ids) to a Batch: the hot path of the reader.

The work is done on one matrix [T, B] of ids, tokens first as in the KJT, with -1 where a bag is empty.
Only multi-valued fields need more: their bags of several values are spliced in beside the matrix.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torchrec import KeyedJaggedTensor

from hetegen_rec.config.run import Frequency
from hetegen_rec.config.schema import NUM_RESERVED_IDS, ReservedId, Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.encoded_rows import LABEL, ROW_ID, context_columns, encoded_schema
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.hashing import salt_of, uniform
from hetegen_rec.data.statistics import Statistics, drop_probability

NO_ITEM = -1
"""`item_rows` of rows whose item is not given, which the 0 of an item without training rows is not."""
_NO_ID = -1
_DROPOUT_SALT = salt_of("oov_dropout")


@dataclass(frozen=True)
class _Bags:
    """The values of one multi-valued field over B rows."""

    values: NDArray[np.int64]
    """[V] ids, row after row."""
    lengths: NDArray[np.int32]
    """[B] values of each row."""

    @property
    def rows(self) -> NDArray[np.int64]:
        """[V] the row of each value."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def places(self) -> NDArray[np.int64]:
        """[V] the place of each value in its row, from 0."""
        starts = np.cumsum(self.lengths) - self.lengths
        return np.arange(len(self.values)) - np.repeat(starts, self.lengths)

    def first_ids(self) -> NDArray[np.int64]:
        """[B] the first id of each row, -1 where it has none."""
        filled = self.lengths > 0
        first = np.full(len(self.lengths), _NO_ID, dtype=np.int64)
        first[filled] = self.values[(np.cumsum(self.lengths) - self.lengths)[filled]]
        return first

    def mean(self, weights: NDArray[np.float32]) -> NDArray[np.float64]:
        """[B] mean over each row's values of `weights` [V]; 0 where it has none."""
        return _mean_of_rows(self.rows, weights, len(self.lengths))

    def mean_of_known(self, weights: NDArray[np.float32]) -> NDArray[np.float64]:
        """[B] mean over each row's values that have ids of their own; over all where none has."""
        known = self.values >= NUM_RESERVED_IDS
        counted = known | ~np.bincount(self.rows[known], minlength=len(self.lengths)).astype(bool)[self.rows]
        return _mean_of_rows(self.rows[counted], weights[counted], len(self.lengths))


def _mean_of_rows(
    rows: NDArray[np.int64], weights: NDArray[np.float32], num_rows: int
) -> NDArray[np.float64]:
    """[B] mean of the `weights` [V] of each of the `rows` [V]; 0 of those that are not among them."""
    sums = np.bincount(rows, weights=weights, minlength=num_rows)
    return sums / np.maximum(np.bincount(rows, minlength=num_rows), 1)


class _ById:
    """A number for every id of several fields or tables, in one flat array: one gather serves all tokens.

    Each segment starts with the entry of the empty bag, 0.
    """

    def __init__(
        self,
        segments: Mapping[str, NDArray[np.floating[Any]]],
        of_tokens: Sequence[str],
        *,
        of_known: bool = False,
    ) -> None:
        """Lays the segments out.

        Args:
            segments: by name, [num_ids] numbers.
            of_tokens: the segment of each token.
            of_known: whether reserved ids take no part in the number of a bag.
        """
        self._of_known = of_known
        self._flat = np.zeros(sum(1 + len(numbers) for numbers in segments.values()), dtype=np.float32)
        first_ids, end = {}, 0
        for name, numbers in segments.items():
            first_ids[name] = end + 1
            end += 1 + len(numbers)
            self._flat[first_ids[name] : end] = numbers
        self._first_ids = np.array([first_ids[name] for name in of_tokens])

    def of_tokens(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[T, B] numbers of the ids [T, B] of all tokens."""
        return self._take(ids + self._first_ids[:, None])

    def of_token(self, token: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Of ids [V] of one token."""
        return self._take(ids + self._first_ids[token])

    def of_rows(self, ids: NDArray[np.int64], bags: Mapping[int, _Bags]) -> torch.Tensor:
        """[B, T] numbers of the ids [B, T]; of a bag the mean over its values: of logs, so that no value
        dominates.
        """
        found = self._take(ids + self._first_ids)
        for token, bag in bags.items():
            mean = bag.mean_of_known if self._of_known else bag.mean
            found[:, token] = mean(self.of_token(token, bag.values))
        return _tensor(found)

    def _take(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        return self._flat.take(places, mode="clip")  # the range is checked already, and this mode is fast


class Batcher:
    """Turns slices of encoded tables into batches."""

    def __init__(
        self,
        schema: Schema,
        statistics: Statistics,
        oov_dropout: float = 0.0,
        movement: Mapping[str, NDArray[np.float32]] | None = None,
        frequencies: Collection[Frequency] = get_args(Frequency),
        *,
        drop_ids: bool = True,
    ):
        """Lays out what belongs to ids.

        Args:
            schema: the fields of a row.
            statistics: of the training rows, for the frequencies.
            oov_dropout: a of the model's training: it replaces an id that its table saw n times by the
                out-of-vocabulary id with probability a / (a + n), so the frequencies are those under
                dropout.
            movement: by table, [num_ids] factors on the gradients of its rows; None for no factors.
            frequencies: those that somebody reads. Looking up the others is saved.
            drop_ids: whether ids are replaced here, for everything that the model sees and reconstructs.
                Whether one is, is a hash of (noise seed, row id, place in the row). Rows to score keep
                theirs.
        """
        self.schema = schema
        self.encoded_schema = encoded_schema(schema)
        self._keys = [token.key for token in schema.tokens]
        fields = [schema.field(token.field) for token in schema.tokens]
        names, tables = [field.name for field in fields], [field.table_name for field in fields]
        self._num_ids = [statistics.table_rows(table) for table in tables]
        self._log_prior = self._log_rate = self._dropout = self._movement = None
        if "log_prior" in frequencies:
            priors = {name: statistics.log_prior(name, oov_dropout) for name in set(names)}
            self._log_prior = _ById(priors, names, of_known=True)
        if "log_rate" in frequencies:
            self._log_rate = _ById({t: statistics.log_rate(t, oov_dropout) for t in set(tables)}, tables)
        if oov_dropout and drop_ids:
            lookups = {table: statistics.lookups(table) for table in set(tables)}
            self._dropout = _ById({t: drop_probability(n, oov_dropout) for t, n in lookups.items()}, tables)
        if movement is not None:
            self._movement = _ById(movement, tables)
        slots = np.array([f.list_length if f.kind == "multi_valued" else 1 for f in fields])
        self._first_slots = (np.cumsum(slots) - slots)[:, None]
        self._num_slots = int(slots.sum())
        self._first_tokens = {name: schema.span(name)[0] for name in schema.field_names}

    def make(
        self,
        table: pa.Table,
        strata: NDArray[np.float32],
        noise_seed: int,
        cursor: Cursor,
        num_real_rows: int,
    ) -> Batch:
        """Makes the batch of all B rows of an encoded table.

        Args:
            table: rows as `conform` returns them.
            strata: [B] place of each row in the global batch, in (0, 1).
            noise_seed: seed of this epoch's noise.
            cursor: where the reader stands after this batch.
            num_real_rows: rows of the global batch that are no padding.
        """
        ids, bags = self._read_ids(table)
        row_ids = _column(table, ROW_ID).astype(np.int64)
        if self._dropout is not None:
            self._drop_rare(self._dropout, ids, bags, row_ids, noise_seed)
        rows = _transposed(ids)
        unread = torch.empty(len(rows), 0)
        return Batch(
            kjt=self._kjt(ids, bags),
            ids=_tensor(rows),
            log_prior=self._log_prior.of_rows(rows, bags) if self._log_prior else unread,
            log_rate=self._log_rate.of_rows(rows, bags) if self._log_rate else unread,
            labels=_tensor(_column(table, LABEL).astype(np.float32)),
            row_ids=_tensor(row_ids),
            strata=_tensor(strata.astype(np.float32)),
            num_real_rows=num_real_rows,
            noise_seed=noise_seed,
            cursor=cursor,
            context=self._context(table),
            movement=self._movement.of_rows(rows, bags) if self._movement else None,
        )

    def conform(self, table: pa.Table, where: str) -> pa.Table:
        """The rows in the columns and types of `encoded_schema`, checked.

        Args:
            table: encoded columns, whatever their file calls its types; others are left out.
            where: file, row group and rows, for errors.

        Raises:
            DataError: a column is missing, or holds what no encoded row holds.
            pyarrow.ArrowInvalid: values that the encoded type cannot hold.
        """
        missing = set(self.encoded_schema.names) - set(table.column_names)
        if missing:
            raise DataError(f"{where}: no encoded column {min(missing)!r}; run prepare again")
        table = table.select(self.encoded_schema.names)
        for name, column in zip(table.column_names, table.columns, strict=True):
            _require(where, name, "rows without a value" if column.null_count else None)
        if not table.schema.equals(self.encoded_schema):
            table = table.cast(self.encoded_schema)
        for name, column in zip(table.column_names, table.columns, strict=True):
            _require(where, name, self._problem(column, name))
        return table

    def padding(self, num_rows: int) -> pa.Table:
        """Encoded rows that stand for none: no ids at all and the row id -1."""
        columns = []
        for field in self.encoded_schema:
            if pa.types.is_list(field.type):
                columns.append(pa.array([[]] * num_rows, field.type))
                continue
            value = _NO_ID if field.name in self.schema.field_names or field.name == ROW_ID else 0
            columns.append(pa.array([value] * num_rows, field.type))
        return pa.table(columns, schema=self.encoded_schema)

    def _read_ids(self, table: pa.Table) -> tuple[NDArray[np.int64], dict[int, _Bags]]:
        """The matrix [T, B], and the bags of the multi-valued fields by token."""
        ids = np.empty((len(self._keys), table.num_rows), dtype=np.int64)
        bags = {}
        for field in self.schema.fields:
            token = self._first_tokens[field.name]
            if not field.is_list:
                ids[token] = _column(table, field.name)
                continue
            values, lengths = _list_column(table, field.name)
            if field.kind == "multi_valued":
                bags[token] = _Bags(values.astype(np.int64), lengths)
                ids[token] = bags[token].first_ids()
                continue
            block = np.full((table.num_rows, field.list_length), _NO_ID, dtype=np.int64)
            block[np.arange(field.list_length) < lengths[:, None]] = values
            ids[token : token + field.list_length] = block.T
        return ids, bags

    def _context(self, table: pa.Table) -> dict[str, torch.Tensor]:
        """The columns that only evaluation reads, [B] each."""
        columns = {
            name: _column(table, column).astype(np.int64)
            for name, column in context_columns(self.schema).items()
        }
        if self.schema.item is not None:
            # The table's own id: dropout may have replaced that of the batch.
            is_missing = _column(table, self.schema.item) == ReservedId.MISSING
            columns["item_rows"][is_missing] = NO_ITEM
        return {name: _tensor(column) for name, column in columns.items()}

    def _problem(self, column: pa.ChunkedArray, name: str) -> str | None:
        """What no encoded column of this name holds, and this one does."""
        if name not in self.schema.field_names:
            return _problem_of_values(column, name)
        field = self.schema.field(name)
        if field.is_list:
            longest = pc.max(pc.list_value_length(column)).as_py() or 0
            if longest > field.list_length:
                return f"{longest} values in a row, but `max_length` is {field.list_length}"
            column = pc.list_flatten(column)
            if column.null_count:  # a cast does not look into lists
                return "rows without a value"
        num_ids = self._num_ids[self._first_tokens[name]]
        least, greatest = (bound.as_py() for bound in pc.min_max(column).values())
        if least is None or 0 <= least <= greatest < num_ids:
            return None
        return f"ids from {least} to {greatest}, but its table has {num_ids} rows"

    def _drop_rare(
        self,
        dropout: _ById,
        ids: NDArray[np.int64],
        bags: dict[int, _Bags],
        row_ids: NDArray[np.int64],
        noise_seed: int,
    ) -> None:
        """Replaces rare ids by the out-of-vocabulary id, in place. Every value of a row has its own draw."""
        salt = noise_seed ^ _DROPOUT_SALT
        counters = row_ids * self._num_slots
        for token, bag in bags.items():
            slots = counters[bag.rows] + self._first_slots[token] + bag.places
            probability = dropout.of_token(token, bag.values)
            bag.values[uniform(slots, salt) < probability] = ReservedId.OUT_OF_VOCABULARY
        probability = dropout.of_tokens(ids)
        ids[uniform(counters + self._first_slots, salt) < probability] = ReservedId.OUT_OF_VOCABULARY

    def _kjt(self, ids: NDArray[np.int64], bags: dict[int, _Bags]) -> KeyedJaggedTensor:
        filled = ids != _NO_ID
        lengths = filled.astype(np.int32)
        pieces, start = [], 0
        for token, bag in bags.items():
            lengths[token] = bag.lengths
            pieces += [_chosen(ids[start:token], filled[start:token]), bag.values]
            start = token + 1
        pieces.append(_chosen(ids[start:], filled[start:]))
        return KeyedJaggedTensor(
            keys=self._keys,
            values=_tensor(pieces[0] if len(pieces) == 1 else np.concatenate(pieces)),
            lengths=_tensor(lengths.reshape(-1)),
            stride=ids.shape[1],
            # Known here, so that nobody asks the device for it later.
            length_per_key=lengths.sum(axis=1).tolist(),
        )


def _require(where: str, name: str, problem: str | None) -> None:
    if problem:
        raise DataError(
            f"{where}: column {name!r} holds {problem}; the file is damaged, or was encoded with other "
            "statistics: run prepare again"
        )


def _problem_of_values(column: pa.ChunkedArray, name: str) -> str | None:
    if name != LABEL:
        return None
    labels = column.to_numpy()
    wrong = labels[(labels != 0) & (labels != 1)]
    return f"the label {wrong[0]}, neither 0 nor 1" if len(wrong) else None


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _column(table: pa.Table, name: str) -> NDArray[Any]:
    values: NDArray[Any] = _array(table, name).to_numpy()
    return values


def _list_column(table: pa.Table, name: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Values, row after row, and the number of values of each row."""
    array = _array(table, name)
    return array.flatten().to_numpy(), array.value_lengths().to_numpy()


def _chosen(matrix: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The chosen elements, row by row; most often all of them, which needs no copy."""
    return matrix.ravel() if chosen.all() else matrix[chosen]


def _transposed(matrix: NDArray[np.int64]) -> NDArray[np.int64]:
    """A copy, by PyTorch, which goes block by block."""
    return _tensor(matrix).t().contiguous().numpy()


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array)
