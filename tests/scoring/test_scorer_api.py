"""Scoring by an artifact: forms of rows, missing and unknown values, threads, refusals."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from tiny_artifact import SCHEMA, raw_rows

from hetegen_rec.data.errors import DataError
from hetegen_rec.scoring import scorer as scorer_module
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.scoring.hardware import this_hardware
from hetegen_rec.scoring.manifest import MANIFEST
from hetegen_rec.scoring.scorer import Scorer
from hetegen_rec.sealing import sealed, unsealed

ROW = {
    "user_id": 101,
    "city": "Oslo",
    "device": "d3",
    "age": 33.0,
    "tags": ["new", "sale"],
    "history": [3, 4, 5],
    "item_id": 7,
}


@pytest.fixture(scope="module")
def scorer(artifact) -> Scorer:
    return Scorer.load(artifact)


def as_arrow(rows):
    names = [field.name for field in SCHEMA.fields]
    return pa.table({name: [row.get(name) for row in rows] for name in names})


FORMS = {
    "dictionaries": lambda rows: rows,
    "a generator": lambda rows: (row for row in rows),
    "Arrow table": as_arrow,
    "Arrow batch": lambda rows: as_arrow(rows).to_batches()[0],
    "pandas": lambda rows: pd.DataFrame(rows, columns=[field.name for field in SCHEMA.fields]),
    "polars": lambda rows: pl.from_arrow(as_arrow(rows)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_rows_scores_alike(scorer, form):
    rows = raw_rows(50)
    expected = scorer.score(as_arrow(rows))
    found = scorer.score(FORMS[form](rows))
    assert found.dtype == np.float32
    assert found.shape == (50,)
    np.testing.assert_array_equal(found, expected)
    assert np.unique(expected).size > 40


def test_columns_may_stand_in_any_order_beside_others(scorer):
    rows = raw_rows(20)
    table = as_arrow(rows)
    mixed = table.select(table.column_names[::-1]).append_column("more", pa.array(range(20)))
    np.testing.assert_array_equal(scorer.score(mixed), scorer.score(table))


MISSING = {
    "absent": lambda row, name: {key: value for key, value in row.items() if key != name},
    "null": lambda row, name: {**row, name: None},
}


@pytest.mark.parametrize("how", MISSING)
@pytest.mark.parametrize("name", ROW)
def test_a_missing_value_is_the_missing_id(scorer, name, how):
    ids = scorer.ids([MISSING[how](ROW, name)])
    expected = scorer.ids([ROW])
    slots = [place for place, table in enumerate(SLOTS) if table == name]
    expected[:, slots] = [0, *[-1] * (len(slots) - 1)] if name != "history" else -1
    assert ids.tolist() == expected.tolist()


SLOTS = ["user_id", "city", "device", "age", *["tags"] * 3, *["history"] * 3, "item_id"]


def test_nan_is_missing_and_unknown_values_are_out_of_vocabulary(scorer):
    known = scorer.ids([ROW])
    assert scorer.ids([{**ROW, "age": float("nan")}])[0, 3] == 0
    assert scorer.ids([{**ROW, "user_id": 5}])[0, 0] == 1
    assert scorer.ids([{**ROW, "city": "Atlantis"}])[0, 1] == 1
    assert scorer.ids([{**ROW, "history": [99, 3]}])[0, 7:10].tolist() == [known[0, 9], 1, -1]
    assert (known[known >= 0] > 1).all()


@pytest.mark.parametrize("other", [ROW, {}], ids=["beside values", "alone"])
@pytest.mark.parametrize("name", ROW)
def test_nan_in_dictionaries_is_missing(scorer, name, other):
    """As in records of a data frame, where it stands for missing strings, lists and large integers too."""
    large = {"user_id": 2**53 + 1} if other else {}
    with_nan, without = ([{**other, **large}, {**ROW, name: value}] for value in (float("nan"), None))
    np.testing.assert_array_equal(scorer.score(with_nan), scorer.score(without))


def test_nan_within_a_list_is_missing(scorer):
    with_nan = [
        {**ROW, "tags": ["new", float("nan"), "sale"]},
        {**ROW, "history": [3, float("nan"), 2**53 + 1]},
    ]
    without = [ROW, {**ROW, "history": [3, 2**53 + 1]}]
    np.testing.assert_array_equal(scorer.score(with_nan), scorer.score(without))


@pytest.mark.parametrize("missing", [np.float32("nan"), pd.NA, pd.NaT])
@pytest.mark.parametrize("name", ROW)
def test_what_numpy_and_pandas_have_for_missing_values_is_missing(scorer, name, missing):
    rows = [{**ROW, name: missing}, {**ROW, "user_id": 2**53 + 1}]
    np.testing.assert_array_equal(scorer.ids(rows), scorer.ids([{**ROW, name: None}, rows[1]]))
    np.testing.assert_array_equal(scorer.ids(rows[:1]), scorer.ids([{**ROW, name: None}]))


@pytest.mark.parametrize("missing", [float("nan"), np.float32("nan"), pd.NA])
def test_missing_values_in_a_tuple_are_missing(scorer, missing):
    rows = [{**ROW, "tags": ("new", missing, "sale"), "history": (3, missing, 2**53 + 1)}]
    np.testing.assert_array_equal(scorer.ids(rows), scorer.ids([{**ROW, "history": [3, 2**53 + 1]}]))


def test_numbers_are_rounded_as_in_training(scorer):
    large = [{**ROW, "age": age} for age in (10**20, 2**53 + 1, np.int64(2**60 + 1), 0.5, True)]
    plain = [{**ROW, "age": age} for age in (1e20, 2.0**53, 2.0**60, 0.5, 1.0)]
    np.testing.assert_array_equal(scorer.ids(large), scorer.ids(plain))


def test_unsigned_integers_in_dictionaries_are_those_of_an_arrow_table(scorer):
    rows = [{**ROW, "user_id": 2**63 + 5, "history": [3, 2**63 + 7]}, ROW]
    names = [field.name for field in SCHEMA.fields]
    unsigned = {"user_id": pa.uint64(), "history": pa.list_(pa.uint64())}
    table = pa.table({name: pa.array([row[name] for row in rows], unsigned.get(name)) for name in names})
    np.testing.assert_array_equal(scorer.ids(rows), scorer.ids(table))


def test_no_rows_have_no_scores(scorer):
    assert scorer.score([]).shape == (0,)
    assert scorer.score(as_arrow([ROW]).slice(0, 0)).shape == (0,)


def test_many_rows_are_scored_in_pieces(scorer, monkeypatch):
    rows = as_arrow(raw_rows(100))
    whole = scorer.score(rows)
    monkeypatch.setattr(scorer_module, "ROWS_AT_ONCE", 7)
    np.testing.assert_allclose(scorer.score(rows), whole, atol=1e-6)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 64])
def test_a_score_does_not_depend_on_the_other_rows(scorer, num_rows):
    rows = raw_rows(64)
    np.testing.assert_allclose(scorer.score(rows[:num_rows]), scorer.score(rows)[:num_rows], atol=1e-6)


def test_threads_get_their_own_scores(scorer):
    batches = [raw_rows(30, seed) for seed in range(16)]
    expected = [scorer.score(rows) for rows in batches]
    start = threading.Barrier(8)

    def score(turn):
        if turn < 8:
            start.wait()
        return scorer.score(batches[turn % 16])

    with ThreadPoolExecutor(8) as pool:
        for turn, found in enumerate(pool.map(score, range(64))):
            np.testing.assert_allclose(found, expected[turn % 16], atol=1e-6)


WRONG = {
    "a number": (3, "rows are int; give a list of dictionaries"),
    "one dictionary": (ROW, "rows are dict; give a list of dictionaries"),
    "a list of numbers": ([1, 2], "row 0 is int, not a dictionary"),
    "text for an integer": ([{**ROW, "user_id": "101"}], "column 'user_id' .* holds string values"),
    "an integer for text": ([{**ROW, "city": 3}], "column 'city' .* holds integer values"),
    "text for a number": ([{**ROW, "age": "old"}], "column 'age' .* expected numbers"),
    "a value for a list": ([{**ROW, "tags": "new"}], "column 'tags' .* expected lists"),
    "mixed types": ([ROW, {**ROW, "city": 3}], "column 'city': .* of one type"),
    "more than 64 bits": ([{**ROW, "user_id": 1 << 70}], "column 'user_id'"),
    "a table with a column twice": (
        as_arrow([ROW]).append_column("age", pa.array([1.0])),
        "rows to score: 2 columns 'age'",
    ),
    "a frame with a column twice": (pd.DataFrame([[1, 2]], columns=["user_id"] * 2), "the data frame: "),
    "half an id": ([{**ROW, "user_id": 1.5}], "column 'user_id' .* whole numbers only"),
    "a column too few": (as_arrow([ROW]).drop_columns(["city"]), "no column 'city'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rows_are_told(scorer, case):
    rows, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        scorer.score(rows)


def rewrite_backend(root, **changes):
    path = root / MANIFEST
    content = unsealed(path.read_text())
    content["backends"]["aten"].update(changes)
    path.write_text(sealed(content))


def test_code_for_another_processor_is_refused(own_artifact):
    hardware = this_hardware().model_dump()
    rewrite_backend(own_artifact, hardware={**hardware, "extensions": [*hardware["extensions"], "avx9000"]})
    with pytest.raises(ArtifactError, match="compiled for another processor, with avx9000"):
        Scorer.load(own_artifact)
    rewrite_backend(own_artifact, hardware={**hardware, "machine": "abacus"})
    with pytest.raises(ArtifactError, match="compiled for another processor, with abacus"):
        Scorer.load(own_artifact, backend="aten")
    rewrite_backend(own_artifact, hardware=hardware)
    Scorer.load(own_artifact)


def test_absent_libraries_and_back_ends_are_told(own_artifact):
    with pytest.raises(ArtifactError, match="no back end 'fbgemm'; it has aten"):
        Scorer.load(own_artifact, backend="fbgemm")
    rewrite_backend(own_artifact, libraries={"torch": torch.__version__, "unheard_of": "1.0"})
    with pytest.raises(ArtifactError, match=r"unheard_of is not installed; install version 1\.0"):
        Scorer.load(own_artifact)
