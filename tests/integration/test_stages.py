"""The stages of one run, from raw files to scores and a report, in one process."""

import json
import shutil
import signal
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_run import FIELDS, files_below, tiny_config, write_tiny

from hetegen_rec import jobs
from hetegen_rec.cli import main
from hetegen_rec.config.run import RunConfig, Stage
from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.distributed.sharding import table_weights
from hetegen_rec.evaluation.results import read_evaluation
from hetegen_rec.locks import directory_lock
from hetegen_rec.training import stages, trained
from hetegen_rec.training.setup import ShardedModel, build_sharded
from hetegen_rec.training.trainer import Trainer

SHORT = ["stages.pretrain.epochs=1", "stages.finetune.epochs=1", "stages.scratch.epochs=1"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a whole demo has run."""
    made = tmp_path_factory.mktemp("stages")
    assert run("demo", made) == 0
    return made


def run(verb: str, directory: Path, *arguments: str) -> int:
    return main([verb, "--config", str(write_tiny(directory)), *SHORT, *arguments])


def copy_of(directory: Path, tmp_path: Path, *stages_to_copy: str) -> RunConfig:
    """The run with a run directory of its own, so that tests do not meet."""
    for stage in stages_to_copy:
        shutil.copytree(directory / "run" / stage, tmp_path / "run" / stage)
    return tiny_config(directory, *SHORT, f"run_dir={tmp_path / 'run'}")


def weights_of(trainer_or_model) -> dict[str, torch.Tensor]:
    """Every weight by name, on this (only) rank."""
    dmp = trainer_or_model.dmp
    found = {}
    for name, weights in table_weights(dmp).items():
        (shard,) = weights.local_shards()
        found[f"table {name}"] = shard.tensor.detach().clone()
    for name, parameter in trainer_or_model.network.named_parameters():
        found[name] = parameter.detach().clone()
    return found


def test_demo_leaves_scores_and_a_report(directory):
    assert "Fine-tuned" in (directory / "run" / "report.html").read_text()
    for stage in ("finetune", "scratch"):
        evaluation = read_evaluation(directory / "run" / stage)
        assert set(evaluation["splits"]) == {"valid", "test"}
        assert evaluation["splits"]["test"]["n"] == 300
        assert "reconstruction" not in evaluation


def test_pretraining_ends_with_the_reconstruction_of_held_out_rows(directory):
    evaluation = read_evaluation(directory / "run" / "pretrain")
    assert evaluation["splits"] == {}
    fields = evaluation["reconstruction"]["valid"]
    assert set(fields) == {field["name"] for field in FIELDS}
    assert all(0 < one["targets"] <= 300 and one["cross_entropy"] > 0 for one in fields.values())
    assert "Reconstruction of valid" in (directory / "run" / "report.html").read_text()


def test_evaluating_pretraining_scores_clicks_too_and_finds_the_same_reconstruction(directory, tmp_path):
    copy_of(directory, tmp_path, "pretrain")
    before = read_evaluation(tmp_path / "run" / "pretrain")
    options = ["--stage", "pretrain", "--no-report", f"run_dir={tmp_path / 'run'}"]
    assert run("evaluate", directory, *options) == 0
    after = read_evaluation(tmp_path / "run" / "pretrain")
    assert after["reconstruction"] == before["reconstruction"]
    assert set(after["splits"]) == {"valid", "test"}


def test_second_demo_repeats_nothing(directory):
    before = files_below(directory)
    assert run("demo", directory) == 0
    after = files_below(directory)
    changed = {path for path in before if before[path] != after.get(path)}
    assert {path for path in changed if not path.endswith(".lock")} <= {"run/report.html"}


def test_demo_replaces_what_another_configuration_left_only_if_told_so(directory, tmp_path, capsys):
    shutil.copytree(directory / "run", tmp_path / "run")
    overrides = [f"run_dir={tmp_path / 'run'}", "train.max_steps=1"]
    assert run("demo", directory, *overrides) == 2
    assert "the budget ends before" in capsys.readouterr().err
    assert run("demo", directory, "--fresh", *overrides) == 0
    assert json.loads((tmp_path / "run" / "scratch" / "done.json").read_text())["steps"] == 1


def test_a_model_is_gone_with_its_tables_before_the_next_one_is_built(directory, tmp_path, monkeypatch):
    """Or the tables of a stage would be there twice when it is evaluated."""
    built: list[weakref.ref] = []
    left: list[bool] = []

    def build(*arguments: object) -> ShardedModel:
        model = build_sharded(*arguments)
        left.extend(earlier() is not None for earlier in built)
        built.append(weakref.ref(model.dmp.module))
        return model

    for module in (stages, trained):
        monkeypatch.setattr(module, "build_sharded", build)
    assert run("demo", directory, f"run_dir={tmp_path / 'run'}", "train.max_steps=2") == 0
    assert len(built) == 6  # three stages, each trained and evaluated
    assert not any(left)


def test_finetune_starts_from_all_pretrained_weights_and_leaves_difficulty(directory, tmp_path):
    config = copy_of(directory, tmp_path, "pretrain")
    with start_runtime("cpu") as runtime:
        statistics = stages.prepare_data(config, runtime)
        pretrained = build_sharded(config, "pretrain", statistics, runtime)
        fresh = weights_of(pretrained)
        checkpoints = stages.open_checkpoints(config, "pretrain", statistics, runtime)
        checkpoints.load(checkpoints.latest(), pretrained.dmp)
        expected = weights_of(pretrained)
        with stages.open_trainer(config, "finetune", runtime) as trainer:
            loaded = weights_of(trainer.model)
            trainer.run()
            tuned = weights_of(trainer.model)
    assert loaded.keys() == expected.keys() == fresh.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(loaded[name], weights, rtol=0, atol=0, msg=name)
    changed = {name for name in tuned if not torch.equal(tuned[name], expected[name])}
    learnt = {name for name in fresh if not torch.equal(fresh[name], expected[name])}
    assert "table user_id" in changed & learnt
    assert [name for name in learnt if "difficulty" in name]
    assert not [name for name in changed if "difficulty" in name]


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "joint", "scratch"])
def test_the_sparse_pipeline_has_the_tables_in_every_step_of_every_stage(
    stage: Stage, directory, tmp_path, monkeypatch
):
    config = copy_of(directory, tmp_path, "pretrain")
    train = config.train.model_copy(update={"max_steps": 4, "evaluations_per_epoch": 5})
    config = config.model_copy(update={"train": train})
    counts = []
    with start_runtime("cpu") as runtime, stages.open_trainer(config, stage, runtime, fresh=True) as trainer:
        pipeline = trainer._pipeline
        progress = pipeline.progress

        def watched(batches):
            outputs = progress(batches)
            counts.append(len(pipeline._pipelined_modules))
            return outputs

        monkeypatch.setattr(pipeline, "progress", watched)
        trainer.run()
    assert counts == [1, 1, 1, 1]  # two steps, an evaluation, two steps


@pytest.mark.parametrize("pipeline", ["sparse_dist", "base"])
def test_every_segment_of_every_epoch_is_trained(pipeline, directory, tmp_path):
    overrides = [f"train.pipeline={pipeline}", "train.evaluations_per_epoch=3", "stages.scratch.epochs=2"]
    assert run("scratch", directory, f"run_dir={tmp_path}", *overrides) == 0
    lines = [json.loads(line) for line in (tmp_path / "scratch" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == list(range(1, 21))
    assert [line["step"] for line in lines if line["event"] == "evaluation"] == [4, 8, 10, 14, 18, 20]


def test_joint_logs_both_losses_and_every_field(directory):
    assert run("joint", directory, "stages.joint.epochs=1") == 0
    text = (directory / "run" / "joint" / "log.jsonl").read_text()
    last = [line for line in map(json.loads, text.splitlines()) if line["event"] == "train"][-1]
    assert {"click", "generative", "label", "calibration"} <= last["terms"].keys()
    assert last["loss"] == pytest.approx(sum(v for k, v in last["terms"].items() if k != "calibration"))
    assert set(last["fields"]) == {"user_id", "item_id", "segment", "intent", "tags", "price", "history"}
    assert sum(values["weight"] for values in last["fields"].values()) == pytest.approx(7, abs=1e-4)


def test_evaluating_twice_says_the_same(directory):
    path = directory / "run" / "scratch" / "evaluation.json"
    first = path.read_text()
    assert run("evaluate", directory, "--stage", "scratch") == 0
    assert path.read_text() == first


def test_predict_writes_every_row_once(directory):
    assert run("predict", directory, "--stage", "scratch", "--split", "train") == 0
    rows = pq.read_table(directory / "run" / "scratch" / "predictions" / "train")
    assert sorted(rows["row_id"].to_pylist()) == list(range(2400))
    assert rows.column_names == ["row_id", "probability", "label", "user_key"]


def test_predict_scores_new_files_without_labels_as_the_same_rows_of_a_split(directory, tmp_path):
    test = pq.read_table(directory / "raw" / "test")
    new = test.drop_columns(["label", "timestamp", "true_probability"])
    pq.write_table(new.slice(0, 100), tmp_path / "new-1.parquet")
    pq.write_table(new.slice(100), tmp_path / "new-2.parquet", row_group_size=64)
    output = tmp_path / "scores"
    options = ["--stage", "scratch", "--input", str(tmp_path / "new-*.parquet"), "--output", str(output)]
    assert run("predict", directory, *options) == 0
    rows = pq.read_table(output).sort_by("row_id")
    assert rows.column_names == ["row_id", "probability", "user_key"]
    assert rows["row_id"].to_pylist() == list(range(300))
    split = pq.read_table(directory / "run" / "scratch" / "predictions" / "test").sort_by("row_id")
    np.testing.assert_allclose(rows["probability"], split["probability"], atol=1e-6)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"new-1.parquet", "new-2.parquet", "scores", ".scores.lock"}


def test_predict_replaces_nothing_that_it_did_not_write(directory, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    options = ["--stage", "scratch", "--output", str(tmp_path)]
    assert run("predict", directory, *options) == 2
    assert f"--output {tmp_path}: exists already" in capsys.readouterr().err
    assert files_below(tmp_path).keys() == {"thesis.tex"}


def test_two_jobs_do_not_predict_into_one_directory(directory, tmp_path, capsys):
    scores, raw = tmp_path / "scores", directory / "raw" / "test" / "*.parquet"
    options = ["--stage", "scratch", "--input", str(raw), "--output", str(scores)]
    with directory_lock(scores):
        assert run("predict", directory, *options) == 2
    assert f"error: {scores}: in use by process" in capsys.readouterr().err
    assert files_below(tmp_path).keys() == {".scores.lock"}


def test_predictions_for_which_no_directory_can_be_made_name_the_option(directory, tmp_path, capsys):
    (tmp_path / "file").touch()
    options = ["--stage", "scratch", "--output", str(tmp_path / "file" / "scores")]
    assert run("predict", directory, *options) == 2
    assert f"error: --output {tmp_path / 'file' / 'scores'}: cannot be made" in capsys.readouterr().err


def test_checkpoint_of_other_training_rows_is_refused_though_the_tables_fit(directory, tmp_path, capsys):
    """The same table sizes with other values behind the ids would score silently wrong."""
    shutil.copytree(directory / "raw", tmp_path / "raw")
    shutil.copytree(directory / "run", tmp_path / "run")
    (path,) = [p for p in (tmp_path / "raw" / "train").glob("*.parquet") if "00000" in p.name]
    rows = pq.read_table(path)
    names = {"segment_00": "segment_renamed"}
    renamed = [names.get(value, value) for value in rows["segment"].to_pylist()]
    index = rows.column_names.index("segment")
    pq.write_table(rows.set_column(index, "segment", pa.array(renamed)), path)
    own = [f"data.{split}={tmp_path / 'raw' / split}/*.parquet" for split in ("train", "valid", "test")]
    overrides = [
        *own,
        "data.source=null",
        f"run_dir={tmp_path / 'run'}",
        f"data.prepared_dir={tmp_path / 'new'}",
    ]
    assert run("evaluate", directory, "--stage", "scratch", *overrides) == 2
    assert "checkpoint of another schema" in capsys.readouterr().err


def test_a_request_to_stop_behind_the_last_step_stops_what_would_follow(directory, tmp_path, capsys):
    """A signal while the last checkpoint is written; outside of the stage it would end the process."""
    config = tiny_config(directory, *SHORT, f"run_dir={tmp_path / 'run'}")
    train = Trainer.run

    def train_and_be_asked(trainer: Trainer) -> bool:
        finished = train(trainer)
        signal.raise_signal(signal.SIGTERM)
        return finished

    with start_runtime("cpu") as runtime, mock.patch.object(Trainer, "run", train_and_be_asked):
        jobs.demo(jobs.Job(config, runtime))
    assert "stopped by SIGTERM" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["pretrain"]
    assert (tmp_path / "run" / "pretrain" / "done.json").exists()


def test_one_pretraining_serves_whatever_scores_clicks(directory, tmp_path):
    pretrained = tiny_config(directory, *SHORT)
    with start_runtime("cpu") as runtime:
        statistics = stages.prepare_data(pretrained, runtime)
        newest = stages.open_checkpoints(pretrained, "pretrain", statistics, runtime).latest()
        with stages.open_trainer(pretrained, "pretrain", runtime) as trainer:
            before = weights_of(trainer.model)
        start = f"stages.finetune.start_from={newest.location}"
        for number, scorer in enumerate(("backbone.name=deepfm", "ctr.hidden=[8]", "ctr.head=label_token")):
            config = tiny_config(
                directory, *SHORT, f"run_dir={tmp_path / str(number)}", f"model.{scorer}", start
            )
            with stages.open_trainer(config, "finetune", runtime) as trainer:
                after = weights_of(trainer.model)
            own = {name for name in after if name.startswith(("backbone.", "ctr_head."))}
            assert all(torch.equal(after[name], before[name]) for name in after.keys() - own), scorer
