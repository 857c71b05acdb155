"""The gate before an artifact is published lets through only what scores as the training model."""

import numpy as np
import pytest

from hetegen_rec.config.export import ExportConfig
from hetegen_rec.export.parity import ParityError, compare, require_parity

LABELS = np.array([0.0, 1.0, 0.0, 1.0])
REFERENCE = np.array([0.1, 0.9, 0.2, 0.8], np.float32)


def require(scores: np.ndarray, **config: str) -> None:
    require_parity(compare(scores, REFERENCE, LABELS), ExportConfig(**config), "aten")


def test_equal_scores_pass():
    require(REFERENCE)


def test_without_rounding_scores_must_be_equal():
    with pytest.raises(ParityError, match=r"differ by up to 1\.00e-03 .* on 4 rows"):
        require(REFERENCE + np.float32(1e-3))


def test_rounded_scores_may_differ_as_long_as_the_order_stays():
    require(REFERENCE + np.float32(1e-3), tables="int8")
    with pytest.raises(ParityError, match=r"AUC 0\.50000 on 4 rows, where the training model has 1\.00000"):
        require(np.full_like(REFERENCE, 0.5), tables="int8")


@pytest.mark.parametrize("tables", ["fp32", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(tables, value):
    scores = REFERENCE.copy()
    scores[1] = value  # of the second of two clicks, so that infinity changes no order
    with pytest.raises(ParityError, match="not all finite"):
        require(scores, tables=tables)


def test_rounded_scores_of_one_label_are_refused_as_nothing_judges_them():
    found = compare(REFERENCE, REFERENCE, np.zeros(4))
    require_parity(found, ExportConfig(), "aten")
    with pytest.raises(ParityError, match=r"first 4 validation rows all have the same label.*parity_rows"):
        require_parity(found, ExportConfig(tables="int8"), "aten")
