"""The encoding tables of an artifact: Parquet files with what each id of a table stands for.

`encoding/TABLE.parquet` has a column `value` in order of id (of `vocab` tables), or a column `edge` (of
`buckets`). Hashed tables need none.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hetegen_rec.config.schema import Field, Schema
from hetegen_rec.data.encoding import FieldEncoder
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.data.vocabulary import BucketVocabulary, ExactVocabulary, HashVocabulary, Vocabulary
from hetegen_rec.scoring.manifest import Artifact, VocabularyEntry

DIRECTORY = "encoding"


def write_vocabularies(
    root: Path, schema: Schema, statistics: Statistics, values: dict[str, pa.Array]
) -> dict[str, VocabularyEntry]:
    """Writes the encoding tables.

    Args:
        root: directory of the artifact.
        schema: the fields.
        statistics: of the training rows.
        values: by table with `vocabulary: vocab`, the values in order of id.

    Returns:
        Their entries of the manifest, by table.
    """
    (root / DIRECTORY).mkdir()
    entries = {}
    for field in schema.table_owners:
        name, found = f"{DIRECTORY}/{field.name}.parquet", statistics.fields[field.name]
        if field.vocabulary == "vocab":
            pq.write_table(pa.table({"value": values[field.name]}), root / name, compression="zstd")
        elif field.vocabulary == "buckets":
            edges = np.empty(0) if found.bucket_edges is None else found.bucket_edges
            pq.write_table(pa.table({"edge": edges}), root / name)
        entries[field.name] = VocabularyEntry(
            kind=field.vocabulary or "vocab",
            num_ids=statistics.table_rows(field.name),
            value_type=found.value_type,
            file=None if field.vocabulary == "hash" else name,
        )
    return entries


def read_encoder(artifact: Artifact) -> FieldEncoder:
    """The encoder of an artifact: gives raw values the ids that they had in training."""
    features, entries = artifact.manifest.features, artifact.manifest.vocabularies
    vocabularies = {
        field.name: _read(artifact, field, entries[field.name]) for field in features.table_owners
    }
    types = {name: entry.value_type for name, entry in entries.items()}
    return FieldEncoder(features, vocabularies, types)


def _read(artifact: Artifact, field: Field, entry: VocabularyEntry) -> Vocabulary:
    if entry.file is None:
        return HashVocabulary(field.name, field.hash_size or 0)
    table = pq.read_table(artifact.path(entry.file))
    if entry.kind == "buckets":
        return BucketVocabulary(table["edge"].to_numpy())
    values = table["value"].combine_chunks()
    if pa.types.is_string(values.type):
        values = values.cast(pa.large_string())
    uncounted = np.zeros(len(values), np.int64)
    return ExactVocabulary(values, uncounted, uncounted, num_kept=len(values))
