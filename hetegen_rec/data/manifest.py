"""The manifest of a prepared data set: what it was made from, so that stale data are noticed."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import fsspec

from hetegen_rec.config.data import DataConfig, Split
from hetegen_rec.config.run import RunConfig
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.bad_shards import BadShard
from hetegen_rec.data.errors import DataError
from hetegen_rec.sealing import digest_of

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 3
"""Raised whenever prepared files change their meaning."""


@dataclass(frozen=True)
class Manifest:
    """What a prepared directory holds and where it came from."""

    schema_fingerprint: str
    """Identifies what in the schema bears on ids."""
    input_fingerprint: str
    """Identifies the raw files (by name, size and time of change) and how they were written."""
    statistics_fingerprint: str
    """Identifies the statistics and vocabularies."""
    preparation: str
    """Identifies all of this; encoded shards carry it, so that those of another preparation are noticed."""
    num_rows: Mapping[Split, int]
    """Usable rows of each split."""
    encoded_splits: Sequence[Split]
    """Splits with encoded shards; none with `data.encode: on_the_fly`."""
    skipped: Sequence[BadShard] = ()
    """What was left out, with `data.on_bad_shard: skip`."""
    format_version: int = FORMAT_VERSION

    def write(self, directory: Path) -> None:
        """Writes `manifest.json`."""
        text = json.dumps(asdict(self), indent=1)
        (directory / MANIFEST_FILE).write_text(text, encoding="utf-8")


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a prepared directory.

    Raises:
        DataError: there is none, or it is of another version.
    """
    path = Path(directory) / MANIFEST_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{directory}: holds no prepared data ({MANIFEST_FILE}); run prepare first"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path}: is damaged ({error}); delete the directory and run prepare again"
        ) from error
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"{directory}: prepared in format {version}, this version reads {FORMAT_VERSION}; "
            "delete it and run prepare again"
        )
    content["skipped"] = tuple(BadShard(**shard) for shard in content["skipped"])
    return Manifest(**content)


def check_prepared(config: RunConfig) -> None:
    """Raises DataError unless `data.prepared_dir` was prepared for the run's schema and reading mode."""
    directory = config.data.prepared_dir
    manifest = read_manifest(directory)
    if manifest.schema_fingerprint != schema_fingerprint(config.features):
        raise DataError(
            f"{directory}: prepared for another schema than `features`; run prepare again, "
            "or set another `data.prepared_dir`"
        )
    missing = [split for split in config.splits() if split not in manifest.encoded_splits]
    if config.data.encode == "prepared" and missing:
        raise DataError(
            f"{directory}: holds no encoded rows of {', '.join(missing)}; run prepare again for this "
            "configuration"
        )


def schema_fingerprint(schema: Schema) -> str:
    """Identifies what in a schema bears on ids: model-side keys of fields may change freely."""
    described = schema.model_dump(mode="json")
    for field in described["fields"]:
        del field["dim"], field["reconstruct"]
    return digest_of(described)


def input_fingerprint(
    data: DataConfig, files: Mapping[Split, Sequence[str]], kept_ids: Mapping[str, object]
) -> str:
    """Identifies the raw files, the ids to keep, and the settings that shape what is written from them."""
    stamps = {split: [_file_identity(path) for path in paths] for split, paths in files.items()}
    return digest_of([stamps, kept_ids, data.encode, data.rows_per_group])


def _file_identity(path: str) -> list[str | int]:
    """Name, size and time of change; a file that is not there is found out when it is read."""
    try:
        if "://" not in path:
            status = os.stat(path)
            return [path, status.st_size, status.st_mtime_ns]
        filesystem, inner = fsspec.core.url_to_fs(path)
        info = filesystem.info(inner)
    except OSError:
        return [path, "not there"]
    # Object stores name the content (`ETag`) or the time of change, each in its own way.
    changed = info.get("ETag") or info.get("LastModified") or info.get("mtime") or info.get("created")
    return [path, info["size"], str(changed)]
