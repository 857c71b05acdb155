"""What an artifact says of itself, and the checks that come before anything in it is used."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

from pydantic import ValidationError

from hetegen_rec.config.errors import Section
from hetegen_rec.config.export import Backend, DensePrecision, ScoringStrategy, TablePrecision
from hetegen_rec.config.inference import InferenceConfig
from hetegen_rec.config.schema import Schema, VocabularyKind
from hetegen_rec.data.columns import ValueType
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.scoring.hardware import Hardware
from hetegen_rec.sealing import sealed, sha256_of, unsealed

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

PartName: TypeAlias = Literal["tokens", "logits", "candidates", "integers"]
"""`tokens`: ids and tables -> tokens [B, T, D] and whether each exists; `logits`: those two -> logits [B];
`candidates`: ids of the shared fields [1, S_shared], those of the others, and tables -> probabilities [B];
`integers`: values [B, S] int64, whether each is given [B, S] bool, and tables -> probabilities [B]."""


class FileEntry(Section):
    """A file of the artifact."""

    bytes: int
    sha256: str


class VocabularyEntry(Section):
    """How the values of one table become ids."""

    kind: VocabularyKind
    num_ids: int
    """Rows of the table, the two reserved ones included."""
    value_type: ValueType
    """Type of the training values."""
    file: str | None = None
    """Parquet: column `value` in order of id, or column `edge`; null for hashes, which need none."""


class TableGroup(Section):
    """The embedding tables of one width, one behind the other in the same files."""

    dim: int
    files: dict[str, str]
    """Arrays of one row per table row (`.npy`), by their part in the precision: `values`, `scale`."""
    first_rows: dict[str, int]
    """Where each table begins."""


class BackendEntry(Section):
    """One compiled form of the network."""

    file: str
    parts: dict[PartName, str] = {}
    """Graphs beside the one from ids to probabilities."""
    libraries: dict[str, str]
    """What must be installed to run it, each with its version at export."""
    hardware: Hardware | None = None
    """What it was compiled for; null if it runs anywhere."""


class StrategiesEntry(Section):
    """What the test-time strategies know of training, besides their files (see `strategies`)."""

    settings: InferenceConfig
    """Of the run; the threshold of `uncertainty` is the one that was found."""
    num_rows: int
    """Training rows."""
    num_positives: int
    """Those with a click."""
    files: list[str]


class Manifest(Section):
    """Content of manifest.json."""

    format_version: int
    name: str
    """Of the run."""
    stage: str
    step: int
    """Of the checkpoint."""
    created: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    """`hetegen_rec`, and the `commit` that it was at, where that is known."""
    features: Schema
    vocabularies: dict[str, VocabularyEntry]
    """By table."""
    precision: TablePrecision
    """Of the tables."""
    dense: DensePrecision
    """Of everything else."""
    tables: list[TableGroup]
    backends: dict[Backend, BackendEntry]
    strategies: list[ScoringStrategy]
    """Test-time strategies that can be chosen; `plain` always."""
    inference: StrategiesEntry | None = None
    """What those need; null if there is only `plain`."""
    shared_fields: list[str] = []
    """Fields of the user's side, which a request may bring once for all its rows."""
    metrics: dict[str, Any]
    """Of the checkpoint, as evaluation measured them under plain scoring."""
    parity: dict[str, Any]
    """By back end: how its scores differ from those of the training model, and on what."""
    files: dict[str, FileEntry]
    """Every file beside manifest.json."""


@dataclass(frozen=True)
class Artifact:
    """An artifact's directory, and its checked manifest."""

    root: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Where a file of the artifact lies."""
        return self.root / name


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Writes manifest.json with a digest of itself."""
    text = sealed(manifest.model_dump(mode="json"))
    (root / MANIFEST).write_text(text, encoding="utf-8")


def describe_files(root: Path) -> dict[str, FileEntry]:
    """All files below a directory but manifest.json, as the manifest lists them."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path != root / MANIFEST)
    return {
        path.relative_to(root).as_posix(): FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in paths
    }


def open_artifact(path: str | Path, *, verify: bool = True) -> Artifact:
    """Opens an artifact.

    Args:
        path: its directory.
        verify: read every file and compare its checksum. Without, only the sizes are compared: for
            artifacts on storage that does so itself.

    Raises:
        ArtifactError: it is none, is of another format, or was changed.
    """
    root = Path(path)
    manifest = _read(root)
    for name, expected in manifest.files.items():
        check_file(root, name, expected, verify=verify)
    for name in _named_files(manifest):
        if name not in manifest.files:
            raise ArtifactError(f"{root}: {MANIFEST} names {name!r} but lists no such file; export it again")
    return Artifact(root, manifest)


def _read(root: Path) -> Manifest:
    try:
        content = unsealed((root / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"{root}: no artifact: {MANIFEST} cannot be read ({error.strerror}); name a directory that "
            "`hetegen export` wrote"
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{root}: {MANIFEST} was changed: {error}; export it again") from error
    _check_version(root, content)
    try:
        return Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise ArtifactError(f"{root}: {MANIFEST} is not one of format {FORMAT_VERSION}: {error}") from error


def _check_version(root: Path, content: Mapping[str, Any]) -> None:
    found = content.get("format_version")
    if found != FORMAT_VERSION:
        raise ArtifactError(
            f"{root}: artifact format {found}, but this version of hetegen_rec reads {FORMAT_VERSION}; score "
            "with the version that exported it, or export it again"
        )


def check_name(root: Path, name: str) -> None:
    """Refuses the name of a file that would lie outside its directory.

    Raises:
        ArtifactError: it would.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not (root / name).resolve().is_relative_to(root.resolve()):
        raise ArtifactError(f"{root}: its manifest names {name!r}, which lies outside; do not use it")


def check_file(root: Path, name: str, expected: FileEntry, *, verify: bool) -> None:
    """Compares a file with what a manifest says of it.

    Args:
        root: the directory that the manifest describes.
        name: of the file in it.
        expected: what the manifest says.
        verify: compare the checksum too, not only the size.

    Raises:
        ArtifactError: it is another, cannot be read, or lies outside.
    """
    check_name(root, name)
    try:
        size = (root / name).stat().st_size
        if size != expected.bytes:
            raise ArtifactError(
                f"{root}: {name} has {size:,} of {expected.bytes:,} bytes; copy or export it again"
            )
        if verify and sha256_of(root / name) != expected.sha256:
            raise ArtifactError(
                f"{root}: {name} was changed: its checksum does not fit; copy or export it again"
            )
    except OSError as error:
        raise ArtifactError(
            f"{root}: {name} cannot be read: {error.strerror}; copy or export it again"
        ) from error


def _named_files(manifest: Manifest) -> list[str]:
    """The files that the manifest wants to be read."""
    names = [entry.file for entry in manifest.vocabularies.values() if entry.file is not None]
    names += [file for group in manifest.tables for file in group.files.values()]
    names += manifest.inference.files if manifest.inference is not None else []
    return names + [
        file for entry in manifest.backends.values() for file in (entry.file, *entry.parts.values())
    ]
