"""One user's fields passed once for many candidates: the probabilities of whole rows."""

import numpy as np
import pytest
from rich_artifact import SHARED

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.export import ExportConfig
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.export.parts import check_parts
from hetegen_rec.scoring.errors import ArtifactError

USERS = {
    "known": {"user_id": 3, "segment": "segment_11", "history": [4, 9, 2]},
    "long history": {"user_id": 8, "segment": "segment_00", "history": [1, 2, 3, 4, 5, 6]},
    "new": {"user_id": -(10**12), "segment": "new", "history": []},
    "without values": {},
}


@pytest.fixture(scope="module")
def candidates(rich_run):
    """Raw rows without the user's side, one of them without any value."""
    rows = rich_run.raw("test").slice(0, 60).drop_columns(list(SHARED)).to_pylist()
    return [*rows, {}]


@pytest.mark.parametrize("backend", ["aten", "fbgemm"])
@pytest.mark.parametrize("user", USERS)
def test_candidates_have_the_probabilities_of_whole_rows(user, backend, rich_run, candidates):
    scorer, shared = rich_run.scorer(backend=backend), USERS[user]
    found = scorer.score_candidates(shared, candidates)
    expected = scorer.score([{**row, **shared} for row in candidates])
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_users_differ(rich_run, candidates):
    scorer = rich_run.scorer()
    known, new = (scorer.score_candidates(USERS[name], candidates) for name in ("known", "new"))
    assert np.abs(known - new).max() > 1e-3


def test_one_candidate_and_none(rich_run, candidates):
    scorer, shared = rich_run.scorer(), USERS["known"]
    alone = scorer.score_candidates(shared, candidates[:1])
    np.testing.assert_allclose(alone, scorer.score_candidates(shared, candidates)[:1], atol=1e-6, rtol=0)
    assert len(scorer.score_candidates(shared, [])) == 0


def test_a_column_of_the_candidates_among_the_shared_ones_is_refused(rich_run, candidates):
    with pytest.raises(DataError, match="shared columns hold item_id, price, which every candidate has"):
        rich_run.scorer().score_candidates({"user_id": 3, "item_id": 7, "price": 1.0}, candidates)


def test_a_table_without_a_column_of_the_candidates_is_refused(rich_run):
    rows = rich_run.raw("test").select(["item_id"])
    with pytest.raises(DataError, match="no column 'intent'"):
        rich_run.scorer().score_candidates(USERS["known"], rows)


def test_the_gate_compares_both_ways(rich_run):
    for found in rich_run.scorer().artifact.manifest.parity.values():
        assert found["shared_fields"]["rows"] == 16 * 240
        assert found["shared_fields"]["greatest_difference"] < 1e-6


def test_a_graph_that_was_not_exported_is_refused_with_its_key(rich_run):
    with pytest.raises(ArtifactError, match=r"export\.raw_integers: true"):
        rich_run.scorer().score_integers(np.zeros((1, 12), np.int64), np.zeros((1, 12), np.bool_))


@pytest.mark.parametrize(
    ("shared", "problem"),
    [
        (("user", "item", "item_age"), "these are all fields"),
        (("item",), "column 'item' of a shared field is also that of field 'item_age'"),
    ],
)
def test_sides_that_cannot_be_told_apart_are_refused(shared, problem):
    fields = [
        {"name": "user", "kind": "id"},
        {"name": "item", "kind": "id"},
        {"name": "item_age", "kind": "numeric", "column": "item"},
    ]
    schema = Schema.model_validate({"label": "click", "fields": fields})
    with pytest.raises(ConfigError, match=problem):
        check_parts(ExportConfig(shared_fields=shared), schema, Statistics(0, 0, {}))
