"""The back end `fbgemm`: the same scores, from rows as FBGEMM's operator reads them."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from tiny_artifact import SCHEMA, raw_rows, write_tiny_artifact

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.export import TablePrecision
from hetegen_rec.export.compile import row_encoder
from hetegen_rec.export.fbgemm import FbgemmLookup
from hetegen_rec.export.lookup import PlainLookup
from hetegen_rec.scoring.layout import NO_ID, Layout
from hetegen_rec.scoring.precision import stored_parts
from hetegen_rec.scoring.scorer import Scorer
from hetegen_rec.scoring.tables import make_groups

PRECISIONS: tuple[TablePrecision, ...] = get_args(TablePrecision)
MOST_ERROR = {"fp32": 1e-6, "fp16": 1e-6, "int8": 0.03, "int4": 0.5}
"""Of a number of a row, between two codings of normal numbers."""
DIMS = {"user_id": 8, "city": 8, "device": 8, "age": 4, "tags": 8, "item_id": 8}
NUM_ROWS = 20


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fbgemm") / "artifact"
    write_tiny_artifact(target, precision="int8", backends=("aten", "fbgemm"))
    return target


@pytest.mark.parametrize("precision", PRECISIONS)
def test_looks_up_what_plain_operations_look_up(precision: TablePrecision) -> None:
    layout, rows = Layout(SCHEMA), dict.fromkeys(DIMS, NUM_ROWS)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, NUM_ROWS, (50, layout.num_slots), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.3] = NO_ID
    encode = row_encoder(precision, ("aten", "fbgemm"), DIMS)
    plain, fused = [], []
    for group in make_groups(DIMS, rows, precision, ("aten", "fbgemm")):
        tables = [table for table in layout.tables if table in group.first_rows]
        first_rows = torch.tensor([group.first_rows[table] for table in tables])
        stored = encode(torch.randn(len(group.first_rows) * NUM_ROWS, group.dim, generator=generator))
        assert set(stored) == set(group.files)
        plain += [first_rows, *(stored[name] for name in stored_parts(precision, "aten"))]
        fused += [first_rows, *(stored[name].view(torch.uint8) for name in stored_parts(precision, "fbgemm"))]

    expected = PlainLookup(layout, DIMS, precision)(ids, ids >= 0, plain)
    found = FbgemmLookup(layout, DIMS, precision)(ids, ids >= 0, fused)

    for one, here, there in zip(layout.fields, found, expected, strict=True):
        assert here.shape == there.shape, one.field.name
        torch.testing.assert_close(here, there, rtol=0, atol=MOST_ERROR[precision])
        nothing = (ids[:, one.start : one.stop] < 0).all(1)
        assert nothing.any()
        assert not here[nothing].any(), one.field.name


def test_an_artifact_scores_by_either_back_end(artifact: Path) -> None:
    rows = raw_rows(300)
    fused = Scorer.load(artifact, backend="fbgemm")
    expected = Scorer.load(artifact, backend="aten").score(rows)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(fused.score(rows), expected, rtol=0, atol=5e-3)
    np.testing.assert_allclose(fused.score(rows[:1]), expected[:1], rtol=0, atol=5e-3)


def test_a_row_takes_its_numbers_and_four_bytes(artifact: Path) -> None:
    group = Scorer.load(artifact, verify=False).artifact.manifest.tables[-1]
    assert group.dim == 8
    fused = np.load(artifact / group.files["fused"], mmap_mode="r")
    assert fused.shape[1] == 8 + 4
    assert len(fused) == len(np.load(artifact / group.files["values"], mmap_mode="r"))


def test_the_graph_names_what_it_needs(artifact: Path) -> None:
    entry = Scorer.load(artifact, verify=False).artifact.manifest.backends["fbgemm"]
    assert set(entry.libraries) == {"torch", "fbgemm_gpu"}
    assert entry.hardware is None


@pytest.mark.parametrize(
    ("backends", "precision", "files"),
    [
        (("aten", "fbgemm"), "fp32", {"values"}),
        (("aten", "fbgemm"), "fp16", {"values"}),
        (("fbgemm",), "int8", {"fused"}),
        (("aoti", "fbgemm"), "int4", {"values", "scale", "fused"}),
    ],
)
def test_what_two_back_ends_read_alike_is_stored_once(backends, precision, files) -> None:
    (group,) = make_groups({"item_id": 8}, {"item_id": 5}, precision, backends)
    assert set(group.files) == files
    assert set(row_encoder(precision, backends, {"item_id": 8})(torch.zeros(5, 8))) == files


@pytest.mark.parametrize(("precision", "dim"), [("int8", 7), ("int4", 6)])
def test_widths_that_the_operator_cannot_store_are_refused(precision, dim) -> None:
    with pytest.raises(ConfigError, match=f"table item_id has {dim}"):
        row_encoder(precision, ("fbgemm",), {"user_id": 8, "item_id": dim})
