"""Rows whose fields are copies of one hidden value, so that each tells what the others must be."""

import numpy as np
import pyarrow as pa
import torch

from hetegen_rec.config.run import ModelConfig, StageConfig, TrainConfig
from hetegen_rec.config.schema import NUM_RESERVED_IDS, ReservedId, Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.batching import Batcher
from hetegen_rec.data.cursor import Cursor, Served
from hetegen_rec.data.encoded_rows import encoded_schema
from hetegen_rec.data.statistics import FieldStatistics, Statistics
from hetegen_rec.models.hetegen import HeteGen, build_model

FIELDS = ("one", "two", "three", "four", "five", "six")
NUM_VALUES = 8
NUM_ROWS = 64
SCHEMA = Schema.model_validate(
    {"label": "click", "fields": [{"name": name, "kind": "categorical"} for name in FIELDS]}
)
VALUES = np.arange(NUM_ROWS) % NUM_VALUES
_FLIPPED = np.arange(NUM_ROWS) // NUM_VALUES % 4 == 0  # so that no score is saturated
LABELS = ((VALUES < NUM_VALUES / 2) ^ _FLIPPED).astype(np.float32)
COUNTS = np.concatenate([np.zeros(NUM_RESERVED_IDS, np.int64), np.bincount(VALUES)])
STATISTICS = Statistics(
    NUM_ROWS,
    int(LABELS.sum()),
    {
        name: FieldStatistics(
            name, NUM_ROWS, 0, 0, NUM_VALUES, len(COUNTS), float(np.log(NUM_VALUES)), COUNTS
        )
        for name in FIELDS
    },
)


def make_batch(changes: dict[tuple[int, str], int] | None = None, step: int = 0) -> Batch:
    """All rows, some cells (row, field) set to another id."""
    ids = {name: (VALUES + NUM_RESERVED_IDS).tolist() for name in FIELDS}
    for (row, name), value in (changes or {}).items():
        ids[name][row] = value
    columns = {**ids, "__label": LABELS.tolist(), "__row_id": list(range(NUM_ROWS))}
    table = pa.table(columns, schema=encoded_schema(SCHEMA))
    strata = ((np.arange(NUM_ROWS) + 0.5) / NUM_ROWS).astype(np.float32)
    cursor = Cursor(0, (Served(1, step),))
    return Batcher(SCHEMA, STATISTICS).make(table, strata, step, cursor, NUM_ROWS)


def trained_model(full_softmax_max: int, steps: int = 150) -> HeteGen:
    """A joint model that knows both the copies and the clicks."""
    config = ModelConfig.model_validate(
        {
            "dim": 16,
            "denoiser": {"num_layers": 1},
            "reconstruction": {"full_softmax_max": full_softmax_max},
            "ctr": {"hidden": [16]},
        }
    )
    model = build_model(SCHEMA, STATISTICS, config, TrainConfig(), "joint", StageConfig(), 0)
    model.ebc.to_empty(device="cpu")
    for weight in model.ebc.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(steps):
        optimizer.zero_grad()
        model(make_batch(step=step))[0].backward()
        optimizer.step()
    return model.eval()


UNKNOWN = int(ReservedId.OUT_OF_VOCABULARY)
