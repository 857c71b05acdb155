"""Files and directories that appear whole or not at all: a reader sees the old one or the new one."""

import os
import shutil
from pathlib import Path


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
    """Moves a finished directory to its place, where an earlier one may stand; both on one file system."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file that never changes a second name, or copies it where there are no such links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
