"""The section `incremental`: what is filled in, and what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from hetegen_rec.config.incremental import IncrementalConfig


def test_the_defaults_are_all_three_ways_over_eight_periods() -> None:
    config = IncrementalConfig()
    assert config.ways == ("finetune", "retrain", "fesail")
    assert (config.periods, config.first_periods, config.epochs) == (8, 1, 1)


def test_one_way_may_stand_without_a_list() -> None:
    assert IncrementalConfig.model_validate({"ways": "retrain"}).ways == ("retrain",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"periods": 2}, "use 3 or more"),
        ({"periods": 5, "first_periods": 4}, "use 6 or more"),
        ({"periods": 6, "period_length": 3600}, "`periods: 6` has no effect with `period_length`"),
        ({"ways": []}, "name at least one"),
        ({"ways": ["retrain", "retrain"]}, "names a way twice"),
        ({"ways": ["retrain"], "replay_rows": 5}, "`replay_rows: 5` has no effect"),
        ({"ways": ["finetune"], "regularisation": 0.5}, "`regularisation: 0.5` has no effect"),
        ({"valid_share": 0.0}, "valid_share"),
        ({"stage": "pretrain"}, "stage"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        IncrementalConfig.model_validate(values)


def test_a_length_takes_the_place_of_a_number_of_periods() -> None:
    assert IncrementalConfig(period_length=86_400, first_periods=10).period_length == 86_400
