"""Writes a delta: what of an artifact differs from an earlier one, its base (see `scoring.delta`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetegen_rec.files import link_or_copy, whole_directory, write_whole
from hetegen_rec.locks import directory_lock
from hetegen_rec.scoring.arrays import map_array, new_array
from hetegen_rec.scoring.delta import (
    DELTA,
    DELTA_VERSION,
    Delta,
    common_rows,
    content_digest,
    table_rows,
)
from hetegen_rec.scoring.manifest import Artifact, TableGroup, describe_files
from hetegen_rec.scoring.tables import DIRECTORY
from hetegen_rec.sealing import sealed

_ROWS_AT_ONCE = 1 << 16


def write_delta(base: Artifact, new: Artifact, target: Path) -> Delta:
    """Writes what turns one artifact into another, in bounded memory; it appears whole or not at all.

    Rows are compared by their stored bytes, so rows that were trained but rounded to the same stay out.

    Args:
        base: that is served.
        new: that should be.
        target: new directory of the delta.

    Returns:
        The content of its delta.json.

    Raises:
        LockedError: another process writes there.
    """
    with directory_lock(target), whole_directory(target) as root:
        return _write(base, new, root)


def _write(base: Artifact, new: Artifact, root: Path) -> Delta:
    changed_rows: dict[str, int] = {}
    patched: dict[str, str] = {}
    for group in new.manifest.tables:
        found = _GroupChanges(base, new, group)
        changed_rows |= found.counts
        if found.can_be_patched:
            patched |= found.write(root)
    known = base.manifest.files
    for name, entry in new.manifest.files.items():
        if name not in patched and known.get(name) != entry:
            link_or_copy(new.path(name), root / name)
    delta = Delta(
        delta_version=DELTA_VERSION,
        base=content_digest(base.manifest),
        manifest=new.manifest,
        patched=patched,
        changed_rows=changed_rows,
        files=describe_files(root),
    )
    write_whole(root / DELTA, sealed(delta.model_dump(mode="json")))
    return delta


class _GroupChanges:
    """The rows of one group of tables that the base lacks, or has with other content."""

    def __init__(self, base: Artifact, new: Artifact, group: TableGroup) -> None:
        """Compares the group's files block by block."""
        self._new, self._group, files = new, group, list(group.files.values())
        is_alike = base.manifest.precision == new.manifest.precision and any(
            old.dim == group.dim and old.files == group.files for old in base.manifest.tables
        )
        self._common = common_rows(new.manifest, base.manifest, group) if is_alike else {}
        self._bases = [map_array(base.path(name)) for name in files] if is_alike else []
        self._arrays = [map_array(new.path(name)) for name in files]
        self.counts = {table: sum(len(rows) for rows in self._changed(table)) for table in group.first_rows}

    @property
    def can_be_patched(self) -> bool:
        """Whether there are changed rows, and they and their numbers are fewer bytes than whole files."""
        files = sum(array.nbytes for array in self._arrays)
        row = files / len(self._arrays[0]) + self._number_type.itemsize
        return 0 < sum(self.counts.values()) < files / row

    @property
    def _number_type(self) -> np.dtype[Any]:
        """The smallest unsigned integers that number all rows."""
        return np.min_scalar_type(len(self._arrays[0]))

    def write(self, root: Path) -> dict[str, str]:
        """Writes rows and their numbers; returns the file of the numbers by those of the rows."""
        numbers_file = f"{DIRECTORY}/{self._group.dim}_rows.npy"
        (root / DIRECTORY).mkdir(exist_ok=True)
        num_changed = sum(self.counts.values())
        numbers = new_array(root / numbers_file, self._number_type, (num_changed,))
        parts = [
            new_array(root / name, array.dtype, (num_changed, *array.shape[1:]))
            for name, array in zip(self._group.files.values(), self._arrays, strict=True)
        ]
        start = 0
        for table in self._group.first_rows:
            for rows in self._changed(table):
                numbers[start : start + len(rows)] = rows
                for part, array in zip(parts, self._arrays, strict=True):
                    part[start : start + len(rows)] = array[rows]
                start += len(rows)
        for array in (numbers, *parts):
            array.flush()
        return dict.fromkeys(self._group.files.values(), numbers_file)

    def _changed(self, table: str) -> Iterator[NDArray[np.int64]]:
        """Numbers of a table's changed rows, block by block, in order."""
        first = self._group.first_rows[table]
        stop = first + table_rows(self._new.manifest, table)
        known = self._common[table].stop if table in self._common else first
        for start in range(first, known, _ROWS_AT_ONCE):
            yield start + np.flatnonzero(self._differ(table, start, min(start + _ROWS_AT_ONCE, known)))
        for start in range(known, stop, _ROWS_AT_ONCE):
            yield np.arange(start, min(start + _ROWS_AT_ONCE, stop))

    def _differ(self, table: str, start: int, stop: int) -> NDArray[np.bool_]:
        """[stop - start]: whether a row has other bytes than in the base, in any of the files."""
        shift = self._common[table].base_start - self._common[table].start
        differ = np.zeros(stop - start, np.bool_)
        for new, old in zip(self._arrays, self._bases, strict=True):
            differ |= (_bytes(new[start:stop]) != _bytes(old[start + shift : stop + shift])).any(1)
        return differ


def _bytes(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """[N, bytes] of N rows: numbers that compare equal may differ in bytes, and NaN equals nothing."""
    return rows.view(np.uint8).reshape(len(rows), -1)
