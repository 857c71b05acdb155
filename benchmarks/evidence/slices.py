"""Rows of users and items that training hardly saw, by fixed bounds, so that data sets and other projects'
figures can be compared. The cold users of `hetegen evaluate` leave out those never seen; these do not.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.dataset as ds

from hetegen_rec.config.data import Split
from hetegen_rec.config.run import RunConfig
from hetegen_rec.data.batching import NO_ITEM
from hetegen_rec.data.encoded_rows import ROW_ID, context_columns
from hetegen_rec.evaluation.metrics import auc
from hetegen_rec.evaluation.significance import PredictionTable
from hetegen_rec.evaluation.slices import MISSING_USER

COLD_USER_ROWS = 5
TAIL_ITEM_ROWS = 10
TITLES = {
    "cold_users": f"Cold users: at most {COLD_USER_ROWS} training rows",
    "tail_items": f"Tail items: at most {TAIL_ITEM_ROWS} training rows",
}


def slice_metrics(config: RunConfig, split: Split, predictions: PredictionTable) -> dict[str, dict[str, Any]]:
    """`n`, `positives` and `auc` (None with one class) of the slices that the schema allows.

    Args:
        config: of the run, whose data are prepared as encoded shards.
        split: of the predictions.
        predictions: of all rows of the split, in order of row id.
    """
    context = _context(config, split)
    places = np.searchsorted(context[ROW_ID], predictions.row_ids)
    found = {}
    for name, inside in _masks(context).items():
        mask = inside[places]
        labels, scores = predictions.labels[mask], predictions.probabilities[mask]
        found[name] = {"n": len(labels), "positives": int(labels.sum()), "auc": auc(scores, labels)}
    return found


def _context(config: RunConfig, split: Split) -> dict[str, npt.NDArray[np.int64]]:
    """Columns of all rows of a split, in order of row id."""
    columns = [*context_columns(config.features).values(), ROW_ID]
    shards = ds.dataset(str(Path(config.data.prepared_dir) / split), format="parquet")
    table = shards.to_table(columns=columns).sort_by(ROW_ID)
    return {name: table[name].to_numpy() for name in columns}


def _masks(context: dict[str, npt.NDArray[np.int64]]) -> dict[str, npt.NDArray[np.bool_]]:
    masks = {}
    if "__user_rows" in context:
        known = context["__user_key"] != MISSING_USER
        masks["cold_users"] = known & (context["__user_rows"] <= COLD_USER_ROWS)
    if "__item_rows" in context:
        known = context["__item_rows"] != NO_ITEM
        masks["tail_items"] = known & (context["__item_rows"] <= TAIL_ITEM_ROWS)
    return masks
