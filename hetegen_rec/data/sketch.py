"""How often combinations of field values were seen in training, in bounded memory.

Combinations of one to three fields are counted in count-min sketches (Cormode and Muthukrishnan, "An
improved data stream summary", J. Algorithms 2005), one a set of fields: a hierarchy by order, after the
hierarchical hashing that is reported for MATT-CTR (arXiv 2510.08932); which sets, and how large, is derived.
Updates are the plain ones, not the conservative ones, so that the sketches of several ranks add up to that
of all rows. An estimate is never below the true count.
"""

import json
import zipfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.hashing import UInt64Array, hash_bucket, mix64, salt_of

FORMAT_VERSION = 1
"""Raised whenever a stored sketch changes its meaning."""
MOST_ROWS = (1 << 32) - 1
"""What a counter holds."""
_COUNTER_BYTES = 4
_WIDEST = 8  # counters for every row: more would stay empty
_ROWS_AT_ONCE = 1024  # for which the keys of all combinations are in memory
_LEVEL_SALTS = "sketch/level"


def choose_sets(num_fields: int, order: int, most: int) -> list[tuple[int, ...]]:
    """Sets of `order` fields, ascending: at most `most`, but each field in one at least.

    Where not all fit, sets come in rings: one set and all its rotations, in which every field stands
    equally often. Rings are taken in an order without preference for neighbours.

    Args:
        num_fields: F.
        order: fields of a set, at most F.
        most: sets wanted.
    """
    chosen: list[tuple[int, ...]] = []
    smallest = -(-num_fields // order)  # rotations that keep a set move each of its fields
    for offsets in _shuffled(list(combinations(range(1, num_fields), order - 1))):
        if chosen and len(chosen) + smallest > most:
            break
        ring = {
            tuple(sorted((start + offset) % num_fields for offset in (0, *offsets)))
            for start in range(num_fields)
        }
        if not chosen or (len(chosen) + len(ring) <= most and ring.isdisjoint(chosen)):
            chosen += ring
    return sorted(chosen)


def _shuffled(rings: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    ranks = mix64(np.arange(len(rings)), salt_of("sketch/rings"))
    return [rings[index] for index in np.argsort(ranks)]


class CombinationCounts:
    """Counts combinations of the ids of a row, each set of fields in a count-min sketch of its own."""

    def __init__(
        self, schema: Schema, num_rows: int, *, order: int, most_sets: int, memory_bytes: int, depth: int
    ) -> None:
        """Chooses the sets; nothing is counted yet.

        Args:
            schema: a list stands for its first value, a sequence for its most recent item.
            num_rows: rows that will be counted, for the size.
            order: most fields of a set.
            most_sets: of every order, see `choose_sets`.
            memory_bytes: for all counters.
            depth: counters of a combination.

        Raises:
            ConfigError: the memory is too small for one counter a set and level.
            DataError: more rows than a counter can hold.
        """
        if num_rows > MOST_ROWS:
            raise DataError(f"{num_rows:,} training rows are more than a sketch counts ({MOST_ROWS:,})")
        self.num_rows = num_rows
        self._salts = [salt_of(f"sketch/field/{name}") for name in schema.field_names]
        self._tokens = [schema.span(name)[0] for name in schema.field_names]
        num_fields = len(self._salts)
        orders = range(1, min(order, num_fields) + 1)
        self.sets_of_order = [choose_sets(num_fields, size, most_sets) for size in orders]
        num_sets = len(self.sets)
        width = min(memory_bytes // (_COUNTER_BYTES * num_sets * depth), _WIDEST * max(num_rows, 1))
        if width < 1:
            raise ConfigError(
                f"inference.feature_paths.sketch_mb: {memory_bytes >> 20} MiB are too few for {num_sets} "
                "sets of fields; raise it, or lower `combinations`"
            )
        self.counters = np.zeros((num_sets, depth, width), np.uint32)

    @property
    def sets(self) -> list[tuple[int, ...]]:
        """The sets of fields, by their places in the schema: the columns of `estimate`."""
        return [fields for sets in self.sets_of_order for fields in sets]

    @property
    def overestimate(self) -> float:
        """How far above the truth an estimate lies, in expectation, at most."""
        return self.num_rows / self.counters.shape[2]

    def add(self, ids: NDArray[np.int64]) -> None:
        """Counts the combinations of rows [B, T] of token ids, as in `Batch.ids`."""
        flat = self.counters.reshape(-1)
        for places in self._places(ids):
            np.add.at(flat, places.ravel(), np.uint32(1))

    def estimate(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B, C]: how often each combination of the rows [B, T] was counted, or more."""
        flat = self.counters.reshape(-1)
        found = [flat[places].min(axis=0) for places in self._places(ids)]
        return np.concatenate(found).astype(np.int64)

    def _places(self, ids: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Blocks [depth, b, C] of the places of the rows' counters in the flat array."""
        num_sets, depth, width = self.counters.shape
        starts = np.arange(num_sets) * depth
        for first in range(0, len(ids), _ROWS_AT_ONCE):
            keys = self._keys(ids[first : first + _ROWS_AT_ONCE])
            yield np.stack(
                [
                    (starts + level) * width
                    + hash_bucket(mix64(keys, salt_of(f"{_LEVEL_SALTS}/{level}")), width)
                    for level in range(depth)
                ]
            )

    def _keys(self, ids: NDArray[np.int64]) -> UInt64Array:
        """[B, C]: of each combination, the sum of the salted hashes of its cells, modulo 2**64."""
        cells = np.stack(
            [
                mix64(np.ascontiguousarray(ids[:, token]), salt)
                for token, salt in zip(self._tokens, self._salts, strict=True)
            ],
            axis=1,
        )
        sums = [np.add.reduce(cells[:, np.array(sets)], axis=-1) for sets in self.sets_of_order]
        return np.concatenate(sums, axis=1)

    def save(self, path: Path, fingerprint: str) -> None:
        """Writes the counters in one piece; the archive holds a checksum of each member.

        Args:
            path: of the file; its directory must exist.
            fingerprint: identifies what was counted and how.
        """
        draft = path.with_name(f".{path.name}.draft")
        with draft.open("wb") as file:
            np.savez(file, counters=self.counters, fingerprint=np.array(self._stamp(fingerprint)))
        draft.replace(path)

    def load(self, path: Path, fingerprint: str) -> bool:
        """Takes over what `save` wrote; returns whether it was there, whole and of the same."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                if str(stored["fingerprint"]) != self._stamp(fingerprint):
                    return False
                self.counters = stored["counters"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return False
        return True

    def _stamp(self, fingerprint: str) -> str:
        described: list[Any] = [FORMAT_VERSION, fingerprint, self._salts, self._tokens, self.sets]
        return json.dumps([*described, self.num_rows, self.counters.shape])
