"""What an earlier attempt left of a stage, and what may change before another goes on with it."""

import json
from pathlib import Path

import pytest
from tiny_run import tiny_config

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.loading import load_config
from hetegen_rec.config.run import RunConfig
from hetegen_rec.evaluation.results import read_evaluation, write_evaluation
from hetegen_rec.training.attempts import (
    begin_attempt,
    check_attempt,
    clear_attempt,
    end_attempt,
    is_done,
    is_of_job,
)
from hetegen_rec.training.state import StageState


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return tiny_config(tmp_path)


def finish(config: RunConfig) -> None:
    begin_attempt(config, "joint", "job-1")
    end_attempt(config, "joint", StageState(step=50, seconds=12.34, skipped_steps=1))


def test_nothing_is_done_and_nothing_is_refused_at_first(config):
    assert not is_done(config, "joint")
    check_attempt(config, "joint")


def test_a_stage_is_done_from_its_end_to_the_next_beginning(config):
    begin_attempt(config, "joint", "job-1")
    assert not is_done(config, "joint")
    end_attempt(config, "joint", StageState(step=50, seconds=12.34, skipped_steps=1))
    assert is_done(config, "joint")
    assert not is_done(config, "scratch")
    done = json.loads((config.stage_dir("joint") / "done.json").read_text())
    assert done == {"steps": 50, "seconds": 12.3, "skipped_steps": 1, "skipped_rows": 0}
    begin_attempt(config, "joint", "job-1")
    assert not is_done(config, "joint")


def test_an_attempt_writes_down_its_configuration_and_drops_the_evaluation_of_the_one_before(config):
    finish(config)
    directory = config.stage_dir("joint")
    evaluation = {"run": "tiny", "stage": "joint", "checkpoint": "", "step": 1, "splits": {}}
    write_evaluation(directory, evaluation)
    begin_attempt(config, "joint", "job-1")
    assert read_evaluation(directory) is None
    assert load_config(directory / "config.yaml") == config


def test_clearing_removes_everything_of_the_stage_only(config):
    finish(config)
    (config.stage_dir("joint") / "checkpoints" / "step-1").mkdir(parents=True)
    begin_attempt(config, "scratch", "job-1")
    clear_attempt(config, "joint", lambda: None)
    clear_attempt(config, "pretrain", lambda: None)
    assert [path.name for path in Path(config.run_dir).iterdir()] == ["scratch"]


OTHER_WEIGHTS = {
    "seed=7": "`seed` was 0, is 7",
    "model.dim=16": "`model.dim` was 8, is 16",
    "model.ctr.dropout=0.5": "`model.ctr.dropout` was 0.0, is 0.5",
    "data.shuffle_rows=77": "`data.shuffle_rows` was",
    "train.batch_size=120": "`train.batch_size` was 240, is 120",
    "train.table_optimizer=sgd": "`train.table_optimizer` was rowwise_adagrad, is sgd",
    "stages.joint.table_lr=0.5": "`stages.joint.table_lr` was 0.05, is 0.5",
    "stages.joint.start_from=/elsewhere/step-1": "`stages.joint.start_from` was None, is /elsewhere/step-1",
    "features.fields=[{name: user_id, kind: id}, {name: item_id, kind: id, min_count: 3}]": (
        r"`features\.fields\.history\.\w+` was .*, is None"
    ),
}


@pytest.mark.parametrize(("override", "message"), OTHER_WEIGHTS.items(), ids=OTHER_WEIGHTS)
def test_what_decides_about_the_weights_may_not_change(override, message, config, tmp_path):
    finish(config)
    changed = tiny_config(tmp_path, override)
    assert not is_done(changed, "joint")
    with pytest.raises(ConfigError, match=message) as raised:
        check_attempt(changed, "joint")
    assert str(raised.value).startswith(f"{config.stage_dir('joint')} holds a stage trained with another")
    assert "replace the earlier stage with --fresh" in str(raised.value)


def test_of_many_changes_a_few_are_told(config, tmp_path):
    finish(config)
    overrides = [
        f"stages.joint.{key}"
        for key in ("table_lr=1", "dense_lr=1", "warmup=1", "table_l2=1", "oov_dropout=1")
    ]
    with pytest.raises(
        ConfigError, match=r"`stages\.joint\.table_lr` was 0\.05, is 1\.0; and 1 more\. Restore"
    ):
        check_attempt(tiny_config(tmp_path, *overrides), "joint")


BUDGETS = ("stages.joint.epochs=9", "stages.joint.patience=4", "train.max_steps=3")


@pytest.mark.parametrize("override", BUDGETS)
def test_another_budget_goes_on_with_a_finished_stage(override, config, tmp_path):
    finish(config)
    changed = tiny_config(tmp_path, override)
    check_attempt(changed, "joint")
    assert not is_done(changed, "joint")


NEITHER = (
    "name=other",
    "stages.scratch.table_lr=0.5",
    "train.log_every=7",
    "train.eval_batch_size=77",
    "data.prefetch_batches=5",
    "distributed.timeout_seconds=9",
    "distributed.tables={default: {sharding: [row_wise]}}",
    "checkpoints.every_steps=5",
)


@pytest.mark.parametrize("override", NEITHER)
def test_what_does_not_touch_the_weights_leaves_a_finished_stage_finished(override, config, tmp_path):
    finish(config)
    changed = tiny_config(tmp_path, override)
    check_attempt(changed, "joint")
    assert is_done(changed, "joint")


def test_a_configuration_of_another_version_is_refused_with_what_to_do(config):
    finish(config)
    path = config.stage_dir("joint") / "config.yaml"
    path.write_text(path.read_text() + "\nhyperspace: true\n")
    for ask in (check_attempt, is_done):
        with pytest.raises(ConfigError, match=r"(?s)config\.yaml: an earlier attempt.*hyperspace.*--fresh"):
            ask(config, "joint")


def test_an_attempt_belongs_to_the_job_that_began_it(config):
    assert not is_of_job(config, "scratch", "job-1")
    begin_attempt(config, "scratch", "job-1")
    assert is_of_job(config, "scratch", "job-1")
    assert not is_of_job(config, "scratch", "job-2")
    clear_attempt(config, "scratch", lambda: None)
    assert not is_of_job(config, "scratch", "job-1")
