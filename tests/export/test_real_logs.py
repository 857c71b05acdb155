"""Raw rows of real click logs: the training path and an artifact give the same probabilities.

The weights are those of the first step: what is tried is the way from raw values to a score. Before
that, values are taken out of the rows, and others put in that training never saw.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hetegen_rec.cli import main
from hetegen_rec.config.loading import load_config
from hetegen_rec.scoring.files import score_files
from hetegen_rec.scoring.scorer import Scorer

CHECKOUT = Path(__file__).parents[2]
DATA = CHECKOUT.parent / "shared" / "data"
ROWS = 10_000
LOGS = ["movielens_100k", "movietweetings_100k", "frappe", "criteo_10k"]

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")


def spoiled(table: pa.Table, config) -> pa.Table:
    """Every seventh value of every column is missing, every eleventh one that training cannot have seen."""
    for field in config.features.fields:
        place = table.column_names.index(field.column)
        values = table[field.column].to_pylist()
        values[::7] = [None] * len(values[::7])
        values[3::11] = [_unseen(field, table[field.column].type)] * len(values[3::11])
        table = table.set_column(place, field.column, pa.array(values, table[field.column].type))
    return table


def _unseen(field, kind: pa.DataType):
    inner = kind.value_type if field.is_list else kind
    value = "never seen" if pa.types.is_string(inner) or pa.types.is_large_string(inner) else -99
    return [value, None, value] if field.is_list else value


@pytest.mark.parametrize("log", LOGS)
def test_ten_thousand_rows_score_alike(log, tmp_path):
    overrides = [
        f"run_dir={tmp_path}/run",
        f"data.prepared_dir={tmp_path}/prepared",
        "data.source=null",
        *[f"data.{split}={DATA}/{log}/{split}/*.parquet" for split in ("valid", "test")],
        f"data.train={tmp_path}/train.parquet",
        "model.backbone.name=deepfm",
        "train.max_steps=1",
        "stages.scratch.table_lr=0.01",
        "train.tensorboard=false",
        "export.parity_rows=100",
    ]
    arguments = ["--config", str(CHECKOUT / "configs" / f"{log}.yaml"), *overrides]
    config = load_config(arguments[1], overrides)
    whole = pq.read_table(sorted((DATA / log / "train").glob("*.parquet")))
    pq.write_table(whole.slice(0, 2 * ROWS), tmp_path / "train.parquet")
    pq.write_table(spoiled(whole.slice(max(len(whole) - ROWS, 0)), config), tmp_path / "rows.parquet")

    assert main(["scratch", "--no-report", *arguments]) == 0
    predicted, artifact = tmp_path / "predicted", tmp_path / "artifact"
    assert (
        main(["predict", "--input", f"{tmp_path}/rows.parquet", "--output", str(predicted), *arguments]) == 0
    )
    assert main(["export", "--output", str(artifact), *arguments]) == 0
    score_files(Scorer.load(artifact), [str(tmp_path / "rows.parquet")], tmp_path / "scores.parquet")

    expected = pq.read_table(predicted).sort_by("row_id")["probability"].to_numpy()
    found = pq.read_table(tmp_path / "scores.parquet")["probability"].to_numpy()
    assert len(found) == min(ROWS, len(whole))
    assert np.unique(found).size > ROWS // 20
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
