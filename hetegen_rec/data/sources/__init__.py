"""Data sets that the project can bring itself, written as raw Parquet like anybody's own data."""

import json
import logging
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hetegen_rec.config.data import SourceConfig
from hetegen_rec.data.sources import movielens, synthetic
from hetegen_rec.data.sources.errors import SourceError

__all__ = ["SourceError", "fetch_source"]

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"


def fetch_source(source: SourceConfig, raw_dir: str | Path) -> None:
    """Brings a built-in data set into `raw_dir`, unless it lies there complete already.

    The directory appears whole or not at all. One of other settings is replaced; one that was not
    made by this function is left alone. One process of a job calls this.

    Args:
        source: which data set, and the settings of a generated one.
        raw_dir: becomes `{train,valid,test}/part-*.parquet` and `manifest.json`.

    Raises:
        SourceError: the data cannot be had or are not the pinned ones, or `raw_dir` holds files of
            somebody else.
    """
    # Without symbolic links, because the directory is replaced by renaming.
    target = Path(raw_dir).resolve()
    settings, write = _recipe(source)
    manifest = _read_manifest(target)
    if manifest is not None and manifest["settings"] == settings and _has_files(target, manifest):
        logger.info("%s: complete in %s", source.name, target)
        return
    if manifest is None:
        _refuse_foreign(target)
    logger.info("%s: writing raw data to %s", source.name, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        built = Path(scratch) / "new"
        built.mkdir()
        write(built)
        _write_manifest(built, settings)
        if target.exists():
            os.replace(target, Path(scratch) / "old")
        os.replace(built, target)


def _recipe(source: SourceConfig) -> tuple[dict[str, Any], Callable[[Path], None]]:
    """What defines the bytes of a data set, and the function that writes them into a directory."""
    if source.name == "movielens-100k":
        origin = {"name": source.name, "version": movielens.VERSION, "package": movielens.PACKAGE}
        return origin, movielens.write
    settings = source.model_dump(mode="json") | {"version": synthetic.VERSION}
    process = synthetic.Process(source.rows, source.id_cardinality, source.seed)
    return settings, partial(synthetic.write, process)


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest in `directory`; None if there is none of ours."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if isinstance(manifest, dict) and {"settings", "files"} <= manifest.keys():
        return manifest
    return None


def _has_files(directory: Path, manifest: dict[str, Any]) -> bool:
    return bool(_sizes(directory) == manifest["files"])


def _sizes(directory: Path) -> dict[str, int]:
    """Size in bytes of every shard, by its path within `directory`."""
    shards = sorted(directory.glob("*/*.parquet"))
    return {shard.relative_to(directory).as_posix(): shard.stat().st_size for shard in shards}


def _write_manifest(directory: Path, settings: dict[str, Any]) -> None:
    manifest = {"settings": settings, "files": _sizes(directory)}
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _refuse_foreign(target: Path) -> None:
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise SourceError(
            f"{target}: is not a data set that was brought here before (no valid {_MANIFEST}) and will "
            "not be overwritten; remove it, or point `data.raw_dir` to another directory"
        )
