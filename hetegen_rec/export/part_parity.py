"""The gate for graphs beside the plain one: they must score as that does, whatever it was rounded to."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.export import DensePrecision
from hetegen_rec.config.schema import Field
from hetegen_rec.data.columns import FieldValues, field_values
from hetegen_rec.export.parity import ParityError
from hetegen_rec.scoring.layout import Layout
from hetegen_rec.scoring.scorer import Scorer

_USERS = 16
_CANDIDATES = 512
_MOST_DIFFERENCE: dict[DensePrecision, float] = {"fp32": 1e-5, "bf16": 2e-2}
"""Of probabilities. A matrix product may sum up in another order for another number of rows."""


def compare_candidates(scorer: Scorer, rows: pa.Table) -> dict[str, Any]:
    """Scores candidates for a few users as such, and as whole rows.

    Args:
        scorer: of an artifact with shared fields.
        rows: raw ones; their user's sides are put before all of them.

    Returns:
        Number of scores and greatest difference.

    Raises:
        ParityError: they differ.
    """
    manifest = scorer.artifact.manifest
    shared = [field.column for field in manifest.features.fields if field.name in manifest.shared_fields]
    rows = rows.slice(0, _CANDIDATES)
    others = rows.drop_columns(list(dict.fromkeys(shared)))
    found, expected = [], []
    for user in rows.select(shared).slice(0, _USERS).to_pylist():
        whole = others
        for name, value in user.items():
            column = pa.array([value] * len(rows), rows.schema.field(name).type)
            whole = whole.append_column(name, column)
        found.append(scorer.score_candidates(user, others))
        expected.append(scorer.score(whole))
    return _require_equal(np.concatenate(found), np.concatenate(expected), scorer, "shared_fields")


def compare_integers(scorer: Scorer, tables: Sequence[pa.Table]) -> dict[str, Any]:
    """Scores raw integers by the graph that encodes them, and through the encoder.

    Args:
        scorer: of an artifact with `raw_integers`.
        tables: raw rows.

    Returns:
        Number of scores and greatest difference.

    Raises:
        ConfigError: a numeric field holds fractions.
        ParityError: they differ.
    """
    layout = Layout(scorer.artifact.manifest.features)
    found = np.concatenate([scorer.score_integers(*integers_of(layout, rows)) for rows in tables])
    expected = np.concatenate([scorer.score(rows) for rows in tables])
    return _require_equal(found, expected, scorer, "raw_integers")


def integers_of(layout: Layout, rows: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """[N, S] values of raw rows, and where they are given.

    Raises:
        ConfigError: a numeric field holds fractions.
    """
    values = np.zeros((len(rows), layout.num_slots), np.int64)
    given = np.zeros(values.shape, np.bool_)
    for one in layout.fields:
        found = field_values(rows, one.field, 0, "the sample")
        filled = np.arange(one.stop - one.start) < found.lengths[:, None]
        values[:, one.start : one.stop][filled] = _integers(one.field, found)
        given[:, one.start : one.stop] = filled
    return values, given


def _integers(field: Field, found: FieldValues) -> NDArray[np.int64]:
    if not len(found.values):
        return np.empty(0, np.int64)
    numbers: NDArray[Any] = found.values.to_numpy(zero_copy_only=False)
    fractions = numbers[numbers != np.trunc(numbers)]
    if len(fractions):
        raise ConfigError(
            f"export.raw_integers: numeric field {field.name!r} holds {fractions[0]}, and the graph takes "
            "whole numbers; set it to false, or train on whole numbers"
        )
    return numbers.astype(np.int64)


def _require_equal(
    found: NDArray[np.float32], expected: NDArray[np.float32], scorer: Scorer, option: str
) -> dict[str, Any]:
    greatest = float(np.abs(found.astype(np.float64) - expected).max())
    if not greatest <= _MOST_DIFFERENCE[scorer.artifact.manifest.dense]:  # nor is NaN
        raise ParityError(
            f"back end {scorer.backend}: the graph of `export.{option}` differs by up to {greatest:.2e} from "
            f"the scores of whole rows, on {len(found):,} of them; nothing was published. Leave "
            f"`export.{option}` out, and report it"
        )
    return {"rows": len(found), "greatest_difference": greatest}
