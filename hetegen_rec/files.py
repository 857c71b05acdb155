"""Files and directories that appear whole or not at all: a reader sees the old one or the new one."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
"""Of Linux: relative paths begin at the working directory; both names stay, each for the other file."""


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in one piece, on disk before it gets its name; one process writes it."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def replace_directory(source: Path, target: Path) -> None:
    """Moves a finished directory to its place, where an earlier one may stand; both on one file system.

    Where the system can exchange two names at once (Linux, on most file systems), there is a directory at the
    place at any moment. Elsewhere there is none between two renames.
    """
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if not target.exists():
        source.rename(target)
        return
    if _exchange(source, target):
        source.rename(old)
    else:
        target.rename(old)
        source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def make_empty(directory: Path) -> None:
    """Makes a directory; what is in an earlier one goes."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Context with a new directory beside a place, which it takes at the end; it vanishes on an error."""
    partial = target.with_name(f".{target.name}.partial")
    make_empty(partial)
    try:
        yield partial
        replace_directory(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Gives two directories the name of each other in one step; returns whether the system can."""
    try:
        exchange = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    here = ctypes.c_int(_AT_FDCWD)
    failed: int = exchange(here, os.fsencode(one), here, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE))
    return failed == 0


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file that never changes a second name, or copies it where there are no such links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
