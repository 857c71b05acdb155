"""Where a stage stands, written down and read again."""

import json
from dataclasses import fields, replace

import pytest

from hetegen_rec.data.cursor import Cursor, Served
from hetegen_rec.training.state import StageState

STOOD = StageState(
    step=1234,
    cursor=Cursor(3, (Served(2, 100), Served(1, 7))),
    batches=17,
    evaluation_due=True,
    best_auc=0.1 + 0.2,
    evaluations_without_gain=2,
    skipped_steps=1,
    skipped_rows=64,
    seconds=12.5,
)


@pytest.mark.parametrize(
    "state",
    [StageState(), STOOD, replace(STOOD, best_auc=-float("inf"))],
    ids=["at the start", "in the middle", "before any evaluation"],
)
def test_json_gives_the_state_back(state):
    text = json.dumps(state.as_json(), allow_nan=False)
    assert StageState.from_json(json.loads(text)) == state


def test_the_one_in_the_middle_has_no_default_left():
    """So that a field that is added stands in the test above, too."""
    assert [
        field.name
        for field in fields(StageState)
        if getattr(STOOD, field.name) == getattr(StageState(), field.name)
    ] == []
