"""The processes that share the work of preparing data, and the directories that they write together."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from hetegen_rec.files import make_empty, replace_directory


class Workers(Protocol):
    """The processes of one job, seen from one of them. `Runtime` is one, as far as data need it."""

    @property
    def rank(self) -> int:
        """Index of this process, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order of rank, on every rank. A collective."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. A collective."""
        ...

    def together(self, what: str) -> Any:
        """Context in which a failure of any rank is raised on every rank. A collective at its end."""
        ...


@contextmanager
def staged(final: Path, workers: Workers) -> Iterator[Path]:
    """A directory beside the final one, for all ranks, that takes its place at the end. A collective.

    If a rank fails, the directory goes and an earlier final one stays: the ranks must fail together, within
    `Workers.together`.

    Args:
        final: on a file system that all ranks share; an earlier directory there is replaced.
        workers: all must call.
    """
    partial = final.with_name(f".{final.name}.partial")
    try:
        with workers.together(f"making {partial}"):
            if workers.rank == 0:
                make_empty(partial)
        yield partial
        with workers.together(f"moving {partial} to its place"):
            if workers.rank == 0:
                replace_directory(partial, final)
    finally:
        if workers.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
