"""What an export shows when it is done."""

from collections.abc import Mapping

from rich.table import Table

from hetegen_rec.scoring.delta import Delta
from hetegen_rec.scoring.manifest import FileEntry, Manifest

_MIB = 1 << 20


def artifact_table(manifest: Manifest) -> Table:
    """Back ends, sizes and parity of an artifact, to print."""
    tables = sum(manifest.files[name].bytes for group in manifest.tables for name in group.files.values())
    whole = sum(entry.bytes for entry in manifest.files.values())
    table = Table(
        title=f"Artifact of {manifest.name}, {manifest.stage}, step {manifest.step}: {whole / _MIB:.2f} MiB, "
        f"of which tables ({manifest.precision}) {tables / _MIB:.2f}"
    )
    for name in ("back end", "MiB", "rows compared", "greatest difference", "AUC", "of the training model"):
        table.add_column(name, justify="left" if name == "back end" else "right")
    for name, backend in manifest.backends.items():
        found = manifest.parity[name]
        table.add_row(
            name,
            f"{manifest.files[backend.file].bytes / _MIB:.2f}",
            f"{found['rows']:,}",
            f"{found['greatest_difference']:.1e}",
            _auc(found["auc"]),
            _auc(found["auc_of_training_model"]),
        )
    return table


def delta_table(delta: Delta) -> Table:
    """Changed rows of each table and size of a delta, to print."""
    mine, whole = _mib(delta.files), _mib(delta.manifest.files)
    table = Table(title=f"Delta: {mine:.2f} MiB, the whole artifact {whole:.2f}")
    for name in ("table", "rows", "changed or new"):
        table.add_column(name, justify="left" if name == "table" else "right")
    for name, count in delta.changed_rows.items():
        table.add_row(name, f"{delta.manifest.vocabularies[name].num_ids:,}", f"{count:,}")
    return table


def _mib(files: Mapping[str, FileEntry]) -> float:
    return sum(entry.bytes for entry in files.values()) / _MIB


def _auc(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
