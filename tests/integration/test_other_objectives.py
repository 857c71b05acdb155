"""The objectives besides diffusion from raw files to scores: what is transferred, and what is refused."""

import json
from pathlib import Path

import pytest
from tiny_run import write_tiny

from hetegen_rec.cli import main
from hetegen_rec.evaluation.results import read_evaluation

SHORT = ("stages.pretrain.epochs=1", "stages.finetune.epochs=1", "train.max_steps=2")
ALL_FIELDS = {"user_id", "item_id", "segment", "intent", "tags", "price", "history"}
PREDICTED = {"next_item": {"item_id"}, "masked_features": ALL_FIELDS, "replaced_features": ALL_FIELDS}
SETTINGS = {"next_item": ", masked: [price]"}


def objective(name: str) -> str:
    return f"model.objective={{name: {name}{SETTINGS.get(name, '')}}}"


def run(verb: str, directory: Path, name: str, *arguments: str) -> int:
    where = (f"run_dir={directory / name}", objective(name))
    return main([verb, "--config", str(write_tiny(directory)), "--no-report", *SHORT, *where, *arguments])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every objective has pre-trained for a moment, and fine-tuned."""
    made = tmp_path_factory.mktemp("objectives")
    for name in PREDICTED:
        assert run("pretrain", made, name) == 0
        assert run("finetune", made, name) == 0
    return made


def error_of(captured: str) -> str:
    (error,) = [line for line in captured.splitlines() if line.startswith("error:")]
    return error


@pytest.mark.parametrize("name", PREDICTED)
def test_pretraining_logs_what_it_predicts_and_fine_tuning_scores(name, directory):
    log = (directory / name / "pretrain" / "log.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, log) if line["event"] == "train"]
    assert {"generative", "calibration"} <= set(steps[0]["terms"])
    assert "label" not in steps[0]["terms"]
    assert set(steps[0]["fields"]) == PREDICTED[name]
    assert read_evaluation(directory / name / "finetune")["splits"]["test"]["n"] == 300


@pytest.mark.parametrize(
    ("name", "other"), [("next_item", "diffusion"), ("masked_features", "replaced_features")]
)
def test_the_pretraining_of_another_objective_is_refused(name, other, directory, tmp_path, capfd):
    written = directory / name / "pretrain" / "checkpoints" / "step-2"
    start = (f"stages.finetune.start_from={written}", f"run_dir={tmp_path}")
    assert run("finetune", directory, other, *start) == 2
    error = error_of(capfd.readouterr().err)
    assert str(written) in error
    assert "model section" in error


@pytest.mark.parametrize("name", PREDICTED)
def test_regeneration_needs_the_heads_of_the_diffusion(name, directory, capfd):
    assert run("evaluate", directory, name, "--stage", "finetune", "inference.strategy=symmetric") == 2
    assert "`model.objective.name: diffusion`" in error_of(capfd.readouterr().err)


@pytest.mark.parametrize(
    ("name", "code"), [("masked_features", 0), ("next_item", 2), ("replaced_features", 2)]
)
def test_cells_are_dropped_to_masks_only_where_those_were_trained(name, code, directory, capfd):
    assert run("evaluate", directory, name, "--stage", "finetune", "inference.strategy=feature_paths") == code
    if code:
        shown = capfd.readouterr().err
        assert "set it to `out_of_vocabulary`" in error_of(shown)
        assert "counting" not in shown  # the refusal does not wait for a pass over the training rows
