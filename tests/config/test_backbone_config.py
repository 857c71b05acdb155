"""Settings of the baselines: what each reads, and what it needs of the schema."""

from typing import Any, get_args

import pytest
from minimal_run import minimal_run
from pydantic import ValidationError

from hetegen_rec.config import ConfigError
from hetegen_rec.config.backbone import BackboneConfig, BackboneName
from hetegen_rec.config.run import ModelConfig, RunConfig

NAMES = get_args(BackboneName)
CHANGED: dict[str, Any] = {
    "hidden": (8,),
    "dropout": 0.1,
    "num_layers": 1,
    "num_heads": 1,
    "structure": "stacked",
    "rank": 2,
    "num_blocks": 1,
    "block_width": 8,
    "reduction_ratio": 2.0,
    "gate_hidden": (8,),
    "first_gate": ("user",),
    "second_gate": ("user",),
    "attention_hidden": (8,),
}
ITEM = {"name": "item", "kind": "id"}
HISTORY = {"name": "history", "kind": "sequence", "table": "item"}


def run_config(fields: list[dict[str, Any]], **backbone: Any) -> RunConfig:
    return minimal_run(features={"fields": fields}, model={"backbone": backbone})


def is_refused(name: str, key: str) -> bool:
    try:
        BackboneConfig.model_validate({"name": name, key: CHANGED[key]})
    except ValidationError as error:
        return f"has no effect with `name: {name}`" in str(error)
    return False


def test_every_setting_is_read_by_some_backbone_and_refused_by_the_others():
    assert set(BackboneConfig.model_fields) == {"name", "generate", *CHANGED}
    for key in CHANGED:
        refusing = {name for name in NAMES if is_refused(name, key)}
        assert {"hetegen", "lr", "fm"} <= refusing < set(NAMES), key


def test_the_default_is_the_network_of_this_project():
    assert ModelConfig().backbone == BackboneConfig(name="hetegen", generate=False)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            {"name": "deepfm", "rank": 2},
            "model.backbone: `rank: 2` has no effect with `name: deepfm`",
        ),
        (
            {"name": "finalmlp", "num_heads": 3},
            r"`hidden: \[256, 128\]` must .*multiple of `num_heads: 3`",
        ),
        ({"name": "finalmlp", "hidden": []}, r"`hidden: \[\]` must end with"),
        (
            {"name": "finalmlp", "first_gate": "usr"},
            "`model.backbone.first_gate` names usr, .*: item",
        ),
        (
            {"name": "autoint", "num_heads": 5},
            "`dim: 32` must .* of `backbone.num_heads: 5`",
        ),
        ({"name": "din"}, "`model.backbone.name: din` .*no field of `features` is of kind `sequence`"),
        ({"name": "xdeepfm"}, "model.backbone.name: .*'deepfm'"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_the_key(backbone, message):
    with pytest.raises(ConfigError, match=message):
        run_config([ITEM], **backbone)


def test_din_takes_a_schema_with_a_history():
    assert run_config([ITEM, HISTORY], name="din").model.backbone.name == "din"


def test_generation_needs_a_head_that_reads_fields():
    with pytest.raises(ValidationError, match=r"`backbone.generate: true` .* `ctr.head: label_token`"):
        ModelConfig.model_validate({"ctr": {"head": "label_token"}, "backbone": {"generate": True}})
    ModelConfig.model_validate({"ctr": {"head": "label_token"}, "backbone": {"name": "fm", "generate": True}})
