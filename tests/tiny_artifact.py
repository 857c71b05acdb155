"""Artifacts of a small untrained model, for tests of what comes behind `hetegen export`.

Every kind of field and of vocabulary occurs. The weights are random, so that scores tell rows apart.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hetegen_rec.config.export import Backend, DensePrecision, TablePrecision
from hetegen_rec.config.run import ModelConfig, StageConfig, TrainConfig
from hetegen_rec.config.schema import NUM_RESERVED_IDS, Field, Schema
from hetegen_rec.data.statistics import FieldStatistics, Statistics
from hetegen_rec.export.compile import compile_graph, row_encoder
from hetegen_rec.export.graph import ScoringGraph
from hetegen_rec.files import replace_directory
from hetegen_rec.models.embedding import table_shapes
from hetegen_rec.models.hetegen import build_model
from hetegen_rec.scoring.layout import Layout
from hetegen_rec.scoring.manifest import FORMAT_VERSION, Artifact, Manifest, describe_files, write_manifest
from hetegen_rec.scoring.tables import make_groups, map_tables, writing
from hetegen_rec.scoring.vocabularies import write_vocabularies

SCHEMA = Schema.model_validate(
    {
        "label": "click",
        "user": "user_id",
        "item": "item_id",
        "fields": [
            {"name": "user_id", "kind": "id"},
            {"name": "city", "kind": "categorical"},
            {"name": "device", "kind": "categorical", "vocabulary": "hash", "hash_size": 16},
            {"name": "age", "kind": "numeric", "num_buckets": 4, "dim": 4},
            {"name": "tags", "kind": "multi_valued", "max_length": 3},
            {"name": "history", "kind": "sequence", "table": "item_id", "max_length": 3},
            {"name": "item_id", "kind": "id"},
        ],
    }
)
VALUES = {
    "user_id": pa.array(range(100, 130), pa.int64()),
    "city": pa.array(["Rome", "Oslo", "Lima", "Kyoto"], pa.large_string()),
    "tags": pa.array(["new", "sale", "used"], pa.large_string()),
    "item_id": pa.array(range(1, 41), pa.int64()),
}
"""Training values of the exact vocabularies, in order of id."""
EDGES = np.array([18.0, 30.0, 50.0])
_MODEL = ModelConfig.model_validate({"dim": 8, "denoiser": {"num_layers": 1}, "ctr": {"hidden": [8]}})


def raw_rows(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Raw rows with known, unknown and missing values."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        row = {
            "user_id": int(rng.integers(100, 133)),
            "city": str(rng.choice(["Rome", "Oslo", "Lima", "Kyoto", "Atlantis"])),
            "device": f"d{rng.integers(50)}",
            "age": float(rng.integers(10, 80)),
            "tags": [str(tag) for tag in rng.choice(["new", "sale", "used", "odd"], rng.integers(0, 4))],
            "history": rng.integers(1, 43, rng.integers(0, 5)).tolist(),
            "item_id": int(rng.integers(1, 43)),
        }
        if rng.random() < 0.2:
            del row[str(rng.choice(["user_id", "city", "age", "history"]))]
        rows.append(row)
    return rows


def write_tiny_artifact(
    target: Path,
    *,
    seed: int = 0,
    step: int = 1,
    precision: TablePrecision = "fp32",
    dense: DensePrecision = "fp32",
    backends: Sequence[Backend] = ("aten",),
) -> Manifest:
    """Writes an artifact; it replaces an earlier one at once.

    Args:
        target: its directory.
        seed: of its weights.
        step: that its manifest tells.
        precision: of the tables.
        dense: precision of the network.
        backends: to compile; `aoti` takes minutes.
    """
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True)
    statistics = _statistics()
    shapes = table_shapes(SCHEMA, statistics, _MODEL.dim)
    dims = {shape.name: shape.dim for shape in shapes}
    rows = {shape.name: shape.num_rows for shape in shapes}
    groups = make_groups(dims, rows, precision, backends)
    generator = torch.Generator().manual_seed(seed)
    with writing(partial, groups, rows, row_encoder(precision, backends, dims)) as writers:
        for table, writer in writers.items():
            writer.write(table, 0, torch.randn(rows[table], dims[table], generator=generator))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="tiny",
        stage="scratch",
        step=step,
        created="2026-01-01T00:00:00+00:00",
        versions={"hetegen_rec": "0.1.0"},
        features=SCHEMA,
        vocabularies=write_vocabularies(partial, SCHEMA, statistics, VALUES),
        precision=precision,
        dense=dense,
        tables=groups,
        backends={},
        strategies=["plain"],
        metrics={},
        parity={},
        files={},
    )
    model = build_model(SCHEMA, statistics, _MODEL, TrainConfig(), "scratch", StageConfig(), seed)
    layout = Layout(SCHEMA)
    for backend in backends:
        graph = ScoringGraph(model.network.eval(), layout, dims, precision, dense, backend)
        tables = map_tables(Artifact(partial, manifest), layout, backend)
        manifest.backends[backend] = compile_graph(graph, tables, backend, partial)
    manifest = manifest.model_copy(update={"files": describe_files(partial)})
    write_manifest(partial, manifest)
    replace_directory(partial, target)
    return manifest


def _statistics() -> Statistics:
    fields = {field.name: _field_statistics(field) for field in SCHEMA.fields}
    return Statistics(num_rows=300, num_positives=100, fields=fields)


def _field_statistics(field: Field) -> FieldStatistics:
    """As if every value had been seen three times."""
    owner = SCHEMA.field(field.table_name)
    edges = EDGES if owner.vocabulary == "buckets" else None
    if owner.vocabulary == "vocab":
        num_values = len(VALUES[owner.name])
        value_type = "integer" if pa.types.is_integer(VALUES[owner.name].type) else "string"
    else:
        num_values = len(EDGES) + 1 if edges is not None else owner.hash_size or 0
        value_type = "number" if edges is not None else "string"
    return FieldStatistics(
        name=field.name,
        num_values=3 * num_values,
        num_missing=0,
        num_out_of_vocabulary=0,
        cardinality=num_values,
        num_ids=NUM_RESERVED_IDS + num_values,
        entropy=float(np.log(num_values)),
        counts=np.array([0] * NUM_RESERVED_IDS + [3] * num_values),
        bucket_edges=edges,
        table=owner.name,
        value_type=value_type,
    )
