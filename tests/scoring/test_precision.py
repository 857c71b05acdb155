"""Rows in few bytes: what is read again is near what was stored, and costs what the documentation says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetegen_rec.scoring.precision import CODINGS

BYTES_PER_ROW = {"fp32": 64, "fp16": 32, "int8": 18, "int4": 12}
"""Of 16 columns."""


def round_trip(precision, rows):
    coding = CODINGS[precision]
    return coding.decode(coding.encode(rows))


@pytest.mark.parametrize("precision", CODINGS)
def test_size_of_a_row(precision):
    parts = CODINGS[precision].encode(torch.randn(10, 16))
    assert sum(part.numel() * part.element_size() for part in parts.values()) == 10 * BYTES_PER_ROW[precision]
    assert all(len(part) == 10 for part in parts.values())
    assert tuple(parts) == CODINGS[precision].names


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize(("precision", "steps"), [("int8", 127), ("int4", 7.5)])
def test_error_is_about_half_a_step(precision, steps, scale):
    rows = scale * torch.randn(200, 16)
    error = (round_trip(precision, rows) - rows).abs().amax(1)
    # A float16 scale is off by up to 2^-11 of itself, and by up to 2^-25 where it is tiny.
    reach = rows.abs().amax(1)
    allowed = 0.5 * reach / steps * 1.05 + reach * 2**-10 + 16 * 2**-24 + 127 * 2**-25
    assert (error <= allowed).all()


@pytest.mark.parametrize("precision", CODINGS)
def test_a_row_of_zeros_stays_one(precision):
    assert torch.equal(round_trip(precision, torch.zeros(3, 8)), torch.zeros(3, 8))


def test_full_precision_is_exact():
    rows = torch.randn(5, 8)
    assert torch.equal(round_trip("fp32", rows), rows)


@given(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4))
def test_any_row_is_read_as_finite_numbers_within_its_range(values):
    row = torch.tensor([values])
    for precision in CODINGS:
        found = round_trip(precision, row)
        assert found.isfinite().all()
        span = max(map(abs, values))
        assert found.abs().max() <= span * 1.01 + 1e-3


def test_the_columns_of_int4_keep_their_order():
    row = torch.arange(16.0)[None]
    assert round_trip("int4", row).round().tolist() == row.tolist()
