"""Baselines from raw files to scores: on other ranks and plans, and against each other's checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from multirank import run_ranks
from tiny_run import tiny_config, write_tiny

from hetegen_rec.cli import main
from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.evaluation.results import read_evaluation
from hetegen_rec.training import stages
from hetegen_rec.training.scoring import score_rows
from hetegen_rec.training.setup import open_split

STEPS = 6
PLANS = {1: "table_wise", 2: "row_wise"}


def backbone(name: str, *, generate: bool = False) -> str:
    return f"model.backbone={{name: {name}, generate: {str(generate).lower()}}}"


# One with a generator, and the one that pools a sequence in its own way.
COMPARED = {"deepfm": backbone("deepfm", generate=True), "din": backbone("din")}


def carry_out(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Trains and scores with every compared backbone; what this rank saw."""
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        return {name: _train_and_score(directory, name, num_ranks, runtime) for name in COMPARED}


def _train_and_score(directory: Path, name: str, num_ranks: int, runtime: Runtime) -> dict[str, Any]:
    config = tiny_config(
        directory / f"{name}-{num_ranks}",
        f"data.raw_dir={directory / 'raw'}",
        f"data.prepared_dir={directory / 'prepared'}",
        "data.lanes=2",
        f"train.max_steps={STEPS}",
        "stages.scratch.table_lr=0.2",
        f"distributed.tables={{default: {{sharding: [{PLANS[num_ranks]}]}}}}",
        COMPARED[name],
    )
    with stages.open_trainer(config, "scratch", runtime) as trainer:
        trainer.run()
    log = config.stage_dir("scratch") / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    reader = open_split(config, "test", trainer.statistics, runtime, stage="scratch")
    predictions = score_rows(trainer.model.dmp, reader, runtime)
    return {
        "losses": [line["loss"] for line in lines if line["event"] == "train"],
        "scores": dict(zip(predictions.rows.row_ids.tolist(), predictions.rows.probabilities, strict=True)),
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks: what every rank saw."""
    directory = tmp_path_factory.mktemp("backbones")
    return {1: [carry_out(directory, 1)], 2: run_ranks(2, carry_out, directory, 2)}


@pytest.mark.parametrize("name", COMPARED)
def test_a_baseline_trains_and_scores_alike_on_two_ranks(name, outcomes):
    alone, both = [seen[name] for seen in outcomes[1]], [seen[name] for seen in outcomes[2]]
    assert len(alone[0]["losses"]) == STEPS
    np.testing.assert_allclose(both[0]["losses"], alone[0]["losses"], atol=1e-4, rtol=0)
    expected = alone[0]["scores"]
    found = {row: score for rank in both for row, score in rank["scores"].items()}
    assert sorted(found) == sorted(expected) == list(range(300))
    assert np.std(list(expected.values())) > 0.01
    np.testing.assert_allclose([found[row] for row in expected], list(expected.values()), atol=1e-4, rtol=0)


SHORT = ("stages.scratch.epochs=1", "train.max_steps=2")


def run(verb: str, directory: Path, *arguments: str) -> int:
    return main([verb, "--config", str(write_tiny(directory)), *SHORT, *arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where FM was trained for a moment."""
    directory = tmp_path_factory.mktemp("fm")
    assert run("scratch", directory, backbone("fm")) == 0
    return directory


def test_a_baseline_is_evaluated_and_predicts(trained):
    assert read_evaluation(trained / "run" / "scratch")["splits"]["test"]["n"] == 300
    assert run("predict", trained, backbone("fm")) == 0
    assert list((trained / "run" / "scratch" / "predictions" / "test").glob("*.parquet"))


def test_a_stopped_baseline_goes_on(trained, tmp_path, capfd):
    shutil.copytree(trained / "run", tmp_path / "run")
    go_on = (f"run_dir={tmp_path / 'run'}", "train.max_steps=3", backbone("fm"))
    assert run("scratch", trained, *go_on) == 0
    assert "scratch goes on from" in capfd.readouterr().err
    assert json.loads((tmp_path / "run" / "scratch" / "done.json").read_text())["steps"] == 3


OTHERS = {
    "lr": backbone("lr"),
    "generated": backbone("fm", generate=True),
    "deepfm": backbone("deepfm"),
    "hetegen": backbone("hetegen"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("verb", ["scratch", "evaluate"])
def test_the_checkpoint_of_another_backbone_is_refused(verb, other, trained, tmp_path, capfd):
    written = trained / "run" / "scratch" / "checkpoints" / "step-2"
    use = {
        "scratch": (f"stages.scratch.start_from={written}",),
        "evaluate": ("--stage", "scratch", "--checkpoint", str(written)),
    }
    assert run(verb, trained, OTHERS[other], f"run_dir={tmp_path / 'run'}", *use[verb]) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert str(written) in error
    assert "model section" in error


def test_a_backbone_scores_by_tables_that_were_pretrained(trained, tmp_path):
    here = (f"run_dir={tmp_path / 'run'}", backbone("fm"), "stages.finetune.epochs=1")
    assert run("pretrain", trained, *here) == 0
    assert run("finetune", trained, *here) == 0
    assert read_evaluation(tmp_path / "run" / "finetune")["splits"]["test"]["n"] == 300
