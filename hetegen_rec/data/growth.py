"""The ids of older prepared data, which newer ones keep, so that what was trained on them goes on."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from hetegen_rec.config.data import DataConfig
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.encoding import vocabulary_path
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.manifest import read_manifest
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.data.summary import KeptTable, definition_of
from hetegen_rec.data.vocabulary import ExactVocabulary, TableIdentity


class KeptIds:
    """The tables of `data.keep_ids_of`; none if it is not set."""

    def __init__(self, data: DataConfig, schema: Schema) -> None:
        """Reads the older statistics.

        Args:
            data: where the older data are.
            schema: of the newer data.

        Raises:
            DataError: nothing was prepared there, or for fields that make other ids.
        """
        self._directory = data.keep_ids_of
        self._statistics: Statistics | None = None
        if self._directory is not None:
            read_manifest(self._directory)
            self._statistics = Statistics.load(self._directory)
            _check_definitions(self._directory, schema, self._statistics.table_identities)

    @property
    def described(self) -> dict[str, Any]:
        """The identities of the tables as plain values."""
        if self._statistics is None:
            return {}
        return {table: identity.as_json() for table, identity in self._statistics.table_identities.items()}

    def of_table(self, table: str) -> KeptTable | None:
        """A table, by the field that owns it; DataError if its vocabulary cannot be read."""
        if self._statistics is None or self._directory is None:
            return None
        owner = self._statistics.fields[table]
        values = None
        if owner.vocabulary_checksum:
            values = _read_values(vocabulary_path(self._directory, table))
        return KeptTable(self._directory, owner, self._statistics.table_identities[table], values)


def _read_values(path: Path) -> pa.Array:
    try:
        return ExactVocabulary.read_values(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); prepare the data of `data.keep_ids_of` again"
        ) from error


def _check_definitions(directory: str, schema: Schema, older: dict[str, TableIdentity]) -> None:
    here = {owner.name: definition_of(owner) for owner in schema.table_owners}
    there = {table: identity.definition for table, identity in older.items()}
    differences = [
        f"field {name!r}: {there.get(name, 'absent')} there, {here.get(name, 'absent')} in `features`"
        for name in {**here, **there}
        if here.get(name) != there.get(name)
    ]
    if differences:
        raise DataError(
            f"`data.keep_ids_of: {directory}` was prepared for fields that make other ids: "
            f"{'; '.join(differences)}. Restore `features`, or take off `data.keep_ids_of` and train from "
            "the start"
        )
