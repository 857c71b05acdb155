"""Which settings an objective reads, and what it needs of the schema and of other sections."""

import pytest
from minimal_run import minimal_run

from hetegen_rec.config import ConfigError

FIELDS = [
    {"name": "user", "kind": "id"},
    {"name": "item", "kind": "id"},
    {"name": "age", "kind": "numeric"},
]


def parse(objective, model=None, **features):
    return minimal_run(
        features={"item": "item", "fields": FIELDS, **features},
        model={"objective": objective, **(model or {})},
    )


@pytest.mark.parametrize(
    ("objective", "features", "model", "message"),
    [
        ({"name": "next_word"}, {}, {}, "'diffusion', 'next_item', 'masked_features' or 'replaced_features'"),
        ({"share": 0.2}, {}, {}, "`share: 0.2` has no effect with `name: diffusion`"),
        ({"masked": ["age"]}, {}, {}, r"`masked: \('age',\)` has no effect with `name: diffusion`"),
        ({"name": "next_item", "masked": [], "share": 0.2}, {}, {}, "no effect with `name: next_item`"),
        (
            {"name": "replaced_features", "num_negatives": 5},
            {},
            {},
            "no effect with `name: replaced_features`",
        ),
        ({"name": "masked_features", "share": 1.0}, {}, {}, "model.objective.share: .*less than 1"),
        ({"name": "next_item"}, {}, {}, r"needs `masked`: .*`masked: \[\]` if none do"),
        ({"name": "next_item", "masked": ["item"]}, {}, {}, "names item, but fields besides .*: user, age"),
        ({"name": "next_item", "masked": ["year"]}, {}, {}, "names year, but fields besides .*: user, age"),
        ({"name": "next_item", "masked": []}, {"item": None}, {}, "`features.item` does not say"),
        (
            {"name": "next_item", "masked": []},
            {"fields": [{"name": "item", "kind": "id", "reconstruct": False}]},
            {},
            "field 'item' has `reconstruct: false`",
        ),
        (
            {"name": "masked_features"},
            {},
            {"balance": {"form": "conditional"}},
            "`balance.form: conditional` needs the noise levels .* not `masked_features`",
        ),
        (
            {"name": "replaced_features"},
            {},
            {"balance": {"form": "aligned"}},
            "`balance.form: aligned` needs .* the label .* not `replaced_features`",
        ),
    ],
)
def test_what_an_objective_cannot_use_is_an_error_that_names_it(objective, features, model, message):
    with pytest.raises(ConfigError, match=message):
        parse(objective, model, **features)


@pytest.mark.parametrize(
    ("objective", "label_in_set"),
    [
        ({}, True),
        ({"name": "next_item", "masked": "age"}, False),
        ({"name": "next_item", "masked": []}, False),
        ({"name": "masked_features", "share": 0.1, "num_negatives": 5}, False),
        ({"name": "replaced_features", "share": 0.1}, False),
    ],
)
def test_the_label_is_in_the_set_of_the_diffusion_alone(objective, label_in_set):
    assert parse(objective).model.label_in_set is label_in_set
    assert not parse(objective, {"noise": {"label_in_set": False}}).model.label_in_set


def test_other_sections_may_stay_when_the_objective_changes():
    model = {"noise": {"kind": "marginal"}, "reconstruction": {"full_softmax_max": 8}}
    assert parse({"name": "masked_features"}, model).model.noise.kind == "marginal"
