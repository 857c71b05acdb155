"""The embedding tables of an artifact: arrays on disk, mapped into memory as a graph takes them.

Tables of one width stand one behind the other, in a `.npy` file for each part of their coding (see
`precision`). The pages of a table that nobody asks for are never read, and all processes of a machine share
those that are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from hetegen_rec.config.export import Backend, TablePrecision
from hetegen_rec.scoring.arrays import new_array
from hetegen_rec.scoring.layout import Layout
from hetegen_rec.scoring.manifest import Artifact, TableGroup
from hetegen_rec.scoring.precision import Parts, stored_parts

DIRECTORY = "tables"

Encode: TypeAlias = Callable[[Tensor], Parts]
"""[N, D] float32 -> the parts that are stored of them."""


class GroupWriter:
    """Writes the tables of one width, block by block, in any order."""

    def __init__(self, root: Path, group: TableGroup, num_rows: int, encode: Encode) -> None:
        """Makes the files in their full size.

        Args:
            root: directory of the artifact.
            group: names of the files, and where each table begins.
            num_rows: of all its tables.
            encode: how rows are stored.

        Raises:
            OSError: there is no room for them.
        """
        self._first_rows, self._encode = group.first_rows, encode
        (root / DIRECTORY).mkdir(exist_ok=True)
        shapes = encode(torch.zeros(1, group.dim))
        self._arrays = {
            name: new_array(root / group.files[name], part.numpy().dtype, (num_rows, *part.shape[1:]))
            for name, part in shapes.items()
        }

    def write(self, table: str, first_row: int, rows: Tensor) -> None:
        """Stores [N, dim] float32 rows of a table, from one of its rows on."""
        start = self._first_rows[table] + first_row
        for name, part in self._encode(rows).items():
            self._arrays[name][start : start + len(rows)] = part.numpy()

    def close(self) -> None:
        """Brings everything to the disk."""
        for array in self._arrays.values():
            array.flush()
        self._arrays = {}


@contextmanager
def writing(
    root: Path, groups: list[TableGroup], rows: Mapping[str, int], encode: Encode
) -> Iterator[dict[str, GroupWriter]]:
    """Context with the writer of each table, by its name.

    Args:
        root: directory of the artifact.
        groups: the tables by their width.
        rows: of each table.
        encode: how they are stored.
    """
    writers = [
        GroupWriter(root, group, sum(rows[table] for table in group.first_rows), encode) for group in groups
    ]
    yield {table: writer for writer, group in zip(writers, groups, strict=True) for table in group.first_rows}
    for writer in writers:
        writer.close()


def make_groups(
    dims: Mapping[str, int], rows: Mapping[str, int], precision: TablePrecision, backends: Sequence[Backend]
) -> list[TableGroup]:
    """The tables by their width, narrow ones first, each group in the order of `dims`.

    What two back ends read alike is stored once.
    """
    parts = dict.fromkeys(part for backend in backends for part in stored_parts(precision, backend))
    groups = []
    for dim in sorted(set(dims.values())):
        first_rows, next_row = {}, 0
        for table in (table for table, width in dims.items() if width == dim):
            first_rows[table] = next_row
            next_row += rows[table]
        files = {name: f"{DIRECTORY}/{dim}_{name}.npy" for name in parts}
        groups.append(TableGroup(dim=dim, files=files, first_rows=first_rows))
    return groups


def map_tables(artifact: Artifact, layout: Layout, backend: Backend) -> list[Tensor]:
    """The arguments behind the ids of a graph: of each group the first row of each slot, and its parts."""
    arguments = []
    for group in artifact.manifest.tables:
        tables = [table for table in layout.tables if table in group.first_rows]
        arguments.append(torch.tensor([group.first_rows[table] for table in tables]))
        for name in stored_parts(artifact.manifest.precision, backend):
            # Copy-on-write, as torch knows no tensor that only may be read; nobody writes.
            array = np.load(artifact.path(group.files[name]), mmap_mode="c", allow_pickle=False)
            # FBGEMM takes rows as bytes, whatever their numbers are.
            arguments.append(torch.from_numpy(array.view(np.uint8) if backend == "fbgemm" else array))
    return arguments
