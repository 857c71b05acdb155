"""The gate before an artifact is published: does it score as the training model does?"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hetegen_rec.config.export import ExportConfig, TablePrecision
from hetegen_rec.evaluation.metrics import auc

_MOST_DIFFERENCE = 1e-5
"""Of probabilities, where nothing is rounded."""
_MOST_AUC_LOSS: Mapping[TablePrecision, float] = MappingProxyType(
    {"fp32": 0.0005, "fp16": 0.0005, "int8": 0.0005, "int4": 0.003}
)
"""Where table rows are rounded, or the network behind them."""


class ParityError(ValueError):
    """An artifact does not score as the training model. The message says by how much, and what to do."""


def compare(
    scores: NDArray[np.float32], reference: NDArray[np.float32], labels: NDArray[np.floating[Any]]
) -> dict[str, Any]:
    """What the manifest tells of one back end: rows, greatest and mean difference, AUC of both."""
    difference = np.abs(scores.astype(np.float64) - reference)
    return {
        "rows": len(scores),
        "greatest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "auc": auc(scores, labels),
        "auc_of_training_model": auc(reference, labels),
    }


def require_parity(found: Mapping[str, Any], config: ExportConfig, backend: str) -> None:
    """Refuses scores beyond tolerance.

    Args:
        found: from `compare`.
        config: what was rounded.
        backend: for the error.

    Raises:
        ParityError: they are beyond it, not finite, or rounded and of rows without an AUC.
    """
    if not math.isfinite(found["greatest_difference"]):
        raise ParityError(
            f"back end {backend}: on {found['rows']:,} rows its scores or those of the training model are "
            "not all finite; nothing was published. If `hetegen evaluate` shows that those are, "
            "take `export.tables: fp32` and `export.dense: fp32`"
        )
    if config.tables == "fp32" and config.dense == "fp32":
        if found["greatest_difference"] > _MOST_DIFFERENCE:
            raise ParityError(
                f"back end {backend}: probabilities differ by up to {found['greatest_difference']:.2e} from "
                f"those of the training model on {found['rows']:,} rows, more than {_MOST_DIFFERENCE:.0e}; "
                "nothing was published. Leave this back end out of `export.backends`, and report it"
            )
        return
    before, after = found["auc_of_training_model"], found["auc"]
    if before is None or after is None:
        raise ParityError(
            f"back end {backend}: the first {found['rows']:,} validation rows all have the same label, so no "
            "AUC says what rounding costs; nothing was published. Raise `export.parity_rows`, or take "
            "`export.tables: fp32` and `export.dense: fp32`"
        )
    limit = _MOST_AUC_LOSS[config.tables]
    if before - after > limit:
        raise ParityError(
            f"back end {backend}: AUC {after:.5f} on {found['rows']:,} rows, where the training model has "
            f"{before:.5f}: a loss of more than {limit}; nothing was published. Take a higher precision for "
            f"`export.tables: {config.tables}` or `export.dense: {config.dense}`"
        )
