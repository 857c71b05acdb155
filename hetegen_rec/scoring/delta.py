"""Deltas: what changed from one artifact to the next, and how a served artifact takes it over.

A delta is a directory. `delta.json`, sealed, holds the manifest of the artifact that results, and names the
base by the digest of its files. Beside it lie the files that changed, under the names that they have in the
artifact: whole, or, of the files of tables, the rows that changed, with a file of their row numbers.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from hetegen_rec.config.errors import Section
from hetegen_rec.files import link_or_copy, whole_directory
from hetegen_rec.locks import directory_lock
from hetegen_rec.scoring.arrays import map_array, new_array
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.scoring.manifest import (
    FORMAT_VERSION,
    Artifact,
    FileEntry,
    Manifest,
    TableGroup,
    check_file,
    check_name,
    open_artifact,
    write_manifest,
)
from hetegen_rec.sealing import digest_of, unsealed

DELTA_VERSION = 1
DELTA = "delta.json"

_ROWS_AT_ONCE = 1 << 16


class Delta(Section):
    """Content of delta.json."""

    delta_version: int
    base: str
    """The artifact that it changes, as `content_digest` names it."""
    manifest: Manifest
    """Of the artifact that results."""
    patched: dict[str, str]
    """Files of the artifact of which the delta has only rows, and the file of their numbers, which count the
    rows of the new file. All other rows are the base's rows of the same table and id."""
    changed_rows: dict[str, int]
    """By table: rows that differ from the base's, and rows of new ids."""
    files: dict[str, FileEntry]
    """Every file of the delta beside delta.json."""


def content_digest(manifest: Manifest) -> str:
    """What names an artifact by the content of its files; two exports of the same have the same."""
    return digest_of({name: entry.sha256 for name, entry in manifest.files.items()})


def open_delta(root: Path) -> Delta:
    """Opens a delta and reads every file of it once, to compare its checksum.

    Raises:
        ArtifactError: it is none, was changed, or is of another format.
    """
    delta = _read(root)
    for name, expected in delta.files.items():
        check_file(root, name, expected, verify=True)
    for name in (name for pair in delta.patched.items() for name in pair):
        if name not in delta.files:
            raise ArtifactError(f"{root}: {DELTA} wants rows from {name!r} but lists no such file")
    return delta


def apply_delta(base: Path, delta: Path, output: Path | None = None) -> Manifest:
    """Makes the next artifact of a base and a delta; it appears whole or not at all.

    It is built beside its place: files that did not change are hard links, those of tables are copied and
    patched in bounded memory, and every checksum is compared before it is moved there. Processes that have
    mapped the base's files keep them.

    Args:
        base: directory of the artifact that the delta was made from, or of one with the same files.
        delta: directory of the delta.
        output: new directory of the result; default: it takes the place of the base.

    Returns:
        The manifest of the result.

    Raises:
        ArtifactError: base or delta was changed, or they do not belong together.
        LockedError: another process makes the same artifact.
    """
    old, change = open_artifact(base, verify=False), open_delta(delta)
    if change.base != content_digest(old.manifest):
        raise ArtifactError(
            f"{delta}: was made from another artifact than {base}, which is of step {old.manifest.step}; "
            "apply the deltas between in order, or take a whole export"
        )
    target = base.resolve() if output is None else output
    if output is not None and output.exists():
        raise ArtifactError(f"--output {output}: exists already; name a new directory, or leave it out")
    with directory_lock(target), whole_directory(target) as root:
        _build(root, old, change, delta)
    return change.manifest


def _read(root: Path) -> Delta:
    try:
        content = unsealed((root / DELTA).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"{root}: no delta: {DELTA} cannot be read ({error.strerror}); name a directory that "
            "`hetegen export --delta-from` wrote"
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{root}: {DELTA} was changed: {error}; copy or export it again") from error
    result = content.get("manifest")
    found = (content.get("delta_version"), result.get("format_version") if isinstance(result, dict) else None)
    if found != (DELTA_VERSION, FORMAT_VERSION):
        raise ArtifactError(
            f"{root}: delta format {found[0]} for artifact format {found[1]}, but this version of "
            f"hetegen_rec reads {DELTA_VERSION} and {FORMAT_VERSION}; apply it with the one that exported it"
        )
    try:
        return Delta.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise ArtifactError(f"{root}: {DELTA} is not one of format {DELTA_VERSION}: {error}") from error


def _build(root: Path, base: Artifact, delta: Delta, source: Path) -> None:
    """Makes all files of the result, and checks them."""
    for name, entry in delta.manifest.files.items():
        check_name(root, name)
        if name in delta.patched:
            continue
        if name not in delta.files and base.manifest.files.get(name) != entry:
            raise ArtifactError(f"{source}: lacks {name}, which is not the base's; export it again")
        link_or_copy(source / name if name in delta.files else base.path(name), root / name)
    for group in delta.manifest.tables:
        for name in group.files.values():
            if name in delta.patched:
                try:
                    _patch(root, base, delta, source, group, name)
                except (LookupError, ValueError) as error:
                    raise ArtifactError(f"{source}: {name} does not fit the base: {error}") from error
    write_manifest(root, delta.manifest)
    open_artifact(root)


def _patch(root: Path, base: Artifact, delta: Delta, source: Path, group: TableGroup, name: str) -> None:
    """Makes one file of a group: the base's rows, where its tables now lie, and then those that changed."""
    numbers, changed = map_array(source / delta.patched[name]), map_array(source / name)
    old = map_array(base.path(name))
    num_rows = sum(table_rows(delta.manifest, table) for table in group.first_rows)
    (root / name).parent.mkdir(exist_ok=True)
    new = new_array(root / name, changed.dtype, (num_rows, *changed.shape[1:]))
    for common in common_rows(delta.manifest, base.manifest, group).values():
        new[common.start : common.stop] = old[common.base_start : common.base_stop]
    for start in range(0, len(numbers), _ROWS_AT_ONCE):
        stop = start + _ROWS_AT_ONCE
        new[numbers[start:stop]] = changed[start:stop]
    new.flush()


@dataclass(frozen=True)
class CommonRows:
    """The rows of one table that two artifacts have, as their files number them."""

    start: int
    base_start: int
    count: int

    @property
    def stop(self) -> int:
        """Behind the last of them."""
        return self.start + self.count

    @property
    def base_stop(self) -> int:
        """Behind the last of them in the base."""
        return self.base_start + self.count


def common_rows(new: Manifest, base: Manifest, group: TableGroup) -> dict[str, CommonRows]:
    """By table of a new artifact's group: the rows whose ids the base has too. Tables may have moved."""
    first_rows = next((old.first_rows for old in base.tables if old.dim == group.dim), {})
    return {
        table: CommonRows(start, first_rows[table], min(table_rows(new, table), table_rows(base, table)))
        for table, start in group.first_rows.items()
        if table in first_rows
    }


def table_rows(manifest: Manifest, table: str) -> int:
    """Rows of a table."""
    return manifest.vocabularies[table].num_ids
