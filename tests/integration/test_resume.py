"""A stage that ended in the middle goes on as if nothing had happened: on one rank, two, and others."""

import contextlib
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from multirank import RanksFailedError, run_ranks
from tiny_run import files_below, tiny_config
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from toy_checkpoints import assert_same_state, whole_state

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.run import RunConfig, Stage
from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.training import stages, trainer
from hetegen_rec.training.checkpoint import CheckpointInfo, read_info
from hetegen_rec.training.checkpoint_writer import CheckpointWriter
from hetegen_rec.training.logs import RunLog
from hetegen_rec.training.meter import Meter
from hetegen_rec.training.scoring import score_rows

EPOCHS, STEPS_PER_EPOCH, STEPS_PER_EVALUATION = 2, 12, 6
STEPS = EPOCHS * STEPS_PER_EPOCH
SETTINGS = (
    f"stages.joint.epochs={EPOCHS}",
    "stages.joint.warmup=0.3",
    "stages.joint.decay=cosine",
    "stages.joint.table_lr=0.2",
    "stages.joint.oov_dropout=1",
    "model.ctr.dropout=0.2",
    "model.denoiser.dropout=0.1",
    "train.batch_size=210",  # the last of 12 batches has 90 rows
    "train.evaluations_per_epoch=2",
    "train.eval_batch_size=90",
    "checkpoints.every_steps=4",
    "checkpoints.keep=3",
    "distributed.timeout_seconds=60",
)
TABLE_WISE, ROW_WISE = (
    f"distributed.tables={{default: {{sharding: [{kind}]}}}}" for kind in ("table_wise", "row_wise")
)
EVERY_ROW = dict.fromkeys(range(2400), 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the data of all runs are prepared, by the first."""
    return tmp_path_factory.mktemp("data")


def config_in(directory: Path, data: Path, *overrides: str) -> RunConfig:
    places = (f"data.raw_dir={data / 'raw'}", f"data.prepared_dir={data / 'prepared'}")
    return tiny_config(directory, *SETTINGS, TABLE_WISE, *places, *overrides)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with start_runtime("cpu") as runtime:
        yield runtime


@contextlib.contextmanager
def after_step(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Context in which something happens behind a step, on this rank."""
    write = RunLog.write

    def acting(log: RunLog, event: str, at: int, values: dict[str, Any]) -> None:
        write(log, event, at, values)
        if (event, at) == ("train", step):
            act()

    with mock.patch.object(RunLog, "write", acting):
        yield


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def rows_trained() -> Iterator[list[list[int]]]:
    """The rows of every step that this rank takes, padding apart, by epoch."""
    rows: list[list[int]] = [[] for _ in range(EPOCHS)]
    add = Meter.add

    def noting(meter: Meter, outputs: Any, count: int) -> None:
        ids = outputs.batch.row_ids
        rows[outputs.batch.cursor.epoch] += ids[ids >= 0].tolist()
        add(meter, outputs, count)

    with mock.patch.object(Meter, "add", noting):
        yield rows


def newest(config: RunConfig, stage: Stage = "joint") -> CheckpointInfo:
    names = [path.name for path in Path(config.checkpoints_dir(stage)).iterdir()]
    step = max(int(name.removeprefix("step-")) for name in names)
    return read_info(f"{config.checkpoints_dir(stage)}/step-{step}")


def tensors_in(checkpoint: CheckpointInfo, directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, read past the product."""
    whole = directory / "whole.pt"
    dcp_to_torch_save(checkpoint.location, whole)
    return dict(_tensors(torch.load(whole)))


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(part, f"{path} {key}".strip())
    elif isinstance(value, torch.Tensor):
        yield path, value


def log_of(config: RunConfig, stage: Stage = "joint") -> list[dict[str, Any]]:
    """The lines of the log without what depends on the clock."""
    path = config.stage_dir(stage) / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "samples_per_second")}
        for line in lines
    ]


def steps_of(config: RunConfig, event: str = "train") -> list[int]:
    return [line["step"] for line in log_of(config) if line["event"] == event]


def assert_same_end(config: RunConfig, undisturbed: RunConfig, tmp_path: Path) -> None:
    """Weights, optimizer state, log, and what is known of the evaluations: all as if undisturbed."""
    found, expected = newest(config), newest(undisturbed)
    assert_same_state(tensors_in(found, tmp_path), tensors_in(expected, tmp_path))
    states = [dict(info.metadata["state"]) for info in (found, expected)]
    assert all(state.pop("seconds") > 0 for state in states)
    assert states[0] == states[1]
    assert states[0]["step"] == STEPS
    assert log_of(config) == log_of(undisturbed)
    assert steps_of(config) == list(range(1, STEPS + 1))
    assert steps_of(config, "evaluation") == list(range(6, STEPS + 1, STEPS_PER_EVALUATION))
    assert json.loads((config.stage_dir("joint") / "done.json").read_text())["steps"] == STEPS


@pytest.fixture(scope="module")
def undisturbed(data: Path, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = config_in(tmp_path_factory.mktemp("undisturbed"), data)
    with rows_trained() as rows:
        assert stages.run_stage(config, "joint", runtime)
    assert [Counter(epoch) for epoch in rows] == [EVERY_ROW] * EPOCHS
    return config


@pytest.fixture(scope="module")
def stopped(
    undisturbed: RunConfig, data: Path, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """A run that was asked to stop in the middle of the second epoch; copy it before going on."""
    config = config_in(tmp_path_factory.mktemp("stopped"), data)
    with after_step(16, ask_to_stop):
        assert not stages.run_stage(config, "joint", runtime)
    return config


def copy_of(run: RunConfig, directory: Path, data: Path, *overrides: str) -> RunConfig:
    shutil.copytree(run.run_dir, directory / "run")
    return config_in(directory, data, *overrides)


def test_a_run_that_was_asked_to_stop_ends_like_an_undisturbed_one(
    stopped, undisturbed, data, runtime, tmp_path, capsys
):
    config = copy_of(stopped, tmp_path, data)
    assert newest(config).step in (16, 17)  # the request is seen after the next step at the latest
    assert not (config.stage_dir("joint") / "done.json").exists()
    with rows_trained() as rows:
        assert stages.run_stage(config, "joint", runtime)
    assert_same_end(config, undisturbed, tmp_path)
    assert rows[0] == []
    assert len(rows[1]) == 2400 - 210 * (newest(stopped).step - STEPS_PER_EPOCH)


def test_stops_in_every_kind_of_place_add_up_to_nothing(undisturbed, data, runtime, tmp_path, capsys):
    config = config_in(tmp_path, data)
    # in the middle of an epoch, at an evaluation, at the end of an epoch, at the last step
    for step in (1, 6, 12, 24):
        with after_step(step, ask_to_stop):
            finished = stages.run_stage(config, "joint", runtime)
        if not finished:
            assert "stopped by SIGTERM after step" in capsys.readouterr().out
    assert finished or stages.run_stage(config, "joint", runtime)
    assert_same_end(config, undisturbed, tmp_path)


def test_an_evaluation_that_was_stopped_happens_when_the_run_goes_on(undisturbed, data, runtime, tmp_path):
    config = config_in(tmp_path, data)
    score_rows = trainer.score_rows

    def asked_to_stop(*arguments: Any) -> Any:
        ask_to_stop()
        return score_rows(*arguments)

    with mock.patch.object(trainer, "score_rows", asked_to_stop):
        assert not stages.run_stage(config, "joint", runtime)
    assert newest(config).step == STEPS_PER_EVALUATION
    assert newest(config).metadata["state"]["evaluation_due"]
    assert steps_of(config, "evaluation") == []
    assert stages.run_stage(config, "joint", runtime)
    assert_same_end(config, undisturbed, tmp_path)


def test_a_run_goes_on_from_before_a_damaged_checkpoint(
    stopped, undisturbed, data, runtime, tmp_path, caplog
):
    config = copy_of(stopped, tmp_path, data)
    damaged = newest(config)
    (shards,) = Path(damaged.location).glob("*.distcp")
    with shards.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff" * 8)
    assert stages.run_stage(config, "joint", runtime)
    assert f"{damaged.location}: damaged: {shards.name} was changed" in caplog.text
    assert_same_end(config, undisturbed, tmp_path)


def test_checkpoints_by_the_clock_leave_training_as_it_is(undisturbed, data, runtime, tmp_path):
    config = config_in(tmp_path, data, "checkpoints.every_steps=null", "checkpoints.every_minutes=1e-6")
    with mock.patch.object(
        CheckpointWriter, "save", autospec=True, side_effect=CheckpointWriter.save
    ) as save:
        assert stages.run_stage(config, "joint", runtime)
    # The clock is looked at behind a step, and all ranks act on it behind the next one.
    assert [call.args[1] for call in save.call_args_list] == list(range(2, STEPS + 1, 2))
    assert_same_end(config, undisturbed, tmp_path)


def test_patience_and_the_best_checkpoint_survive_a_stop(data, runtime, tmp_path):
    config = config_in(tmp_path, data, "stages.joint.patience=2")
    aucs = iter([0.7, 0.6, 0.65, 0.8])
    with mock.patch.object(trainer, "measure", side_effect=lambda *_: {"auc": next(aucs)}):
        with after_step(13, ask_to_stop):
            assert not stages.run_stage(config, "joint", runtime)
        assert stages.run_stage(config, "joint", runtime)
    assert steps_of(config, "evaluation") == [6, 12, 18]
    statistics = stages.prepare_data(config, runtime)
    checkpoints = stages.open_checkpoints(config, "joint", statistics, runtime)
    assert checkpoints.best().step == 6
    assert checkpoints.latest().step == 18


def test_a_finished_stage_is_not_trained_again(undisturbed, data, runtime, tmp_path):
    config = copy_of(undisturbed, tmp_path, data)
    before = files_below(tmp_path)
    assert stages.run_stage(config, "joint", runtime)
    assert files_below(tmp_path) == before


def test_a_larger_budget_goes_on_with_a_finished_stage(undisturbed, data, runtime, tmp_path):
    config = config_in(tmp_path, data, "train.max_steps=9")
    larger = config_in(tmp_path, data)
    with rows_trained() as rows:
        assert stages.run_stage(config, "joint", runtime)
        assert newest(config).step == 9
        assert stages.run_stage(larger, "joint", runtime)
    assert [Counter(epoch) for epoch in rows] == [EVERY_ROW] * EPOCHS
    assert steps_of(larger) == list(range(1, STEPS + 1))
    assert steps_of(larger, "evaluation") == [6, 9, 12, 18, 24]


def test_a_smaller_budget_than_what_is_trained_is_refused(stopped, data, runtime, tmp_path):
    config = copy_of(stopped, tmp_path, data, "train.max_steps=9")
    before = files_below(tmp_path)
    with pytest.raises(ConfigError, match=r"holds 1[67] trained steps, .*train\.max_steps"):
        stages.run_stage(config, "joint", runtime)
    assert files_below(tmp_path) == before


def test_another_configuration_is_refused_and_changes_nothing(stopped, data, runtime, tmp_path):
    config = copy_of(stopped, tmp_path, data, "stages.joint.table_lr=0.3")
    before = files_below(tmp_path)
    with pytest.raises(ConfigError, match=r"`stages\.joint\.table_lr` was 0\.2, is 0\.3"):
        stages.run_stage(config, "joint", runtime)
    assert files_below(tmp_path) == before


def test_checkpoints_that_lie_elsewhere_are_neither_passed_over_nor_removed(stopped, data, runtime, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    config = copy_of(stopped, tmp_path, data, f"checkpoints.directory={elsewhere}", "train.max_steps=17")
    before = files_below(tmp_path)
    with pytest.raises(ConfigError, match=r"step-16 is the newest checkpoint .* move the checkpoints there"):
        stages.run_stage(config, "joint", runtime)
    assert files_below(tmp_path) == before
    shutil.move(tmp_path / "run" / "joint" / "checkpoints", elsewhere / "joint")
    assert stages.run_stage(config, "joint", runtime)
    assert steps_of(config) == list(range(1, 18))


def test_a_fresh_start_replaces_what_was_there(stopped, data, runtime, tmp_path):
    config = copy_of(stopped, tmp_path, data, "seed=7", "train.max_steps=2")
    (config.stage_dir("joint") / "evaluation.json").write_text("{}")
    another_job = replace(runtime, job_id="another")
    assert stages.run_stage(config, "joint", another_job, fresh=True)
    assert steps_of(config) == [1, 2]
    assert [path.name for path in Path(config.checkpoints_dir("joint")).iterdir()] == ["step-2"]
    assert not (config.stage_dir("joint") / "evaluation.json").exists()


def test_finetune_starts_from_the_newest_checkpoint_of_a_pretraining_that_was_killed(data, runtime, tmp_path):
    config = config_in(tmp_path, data)
    with after_step(5, ask_to_stop):
        assert not stages.run_stage(config, "pretrain", runtime)
    pretrained = tensors_in(newest(config, "pretrain"), tmp_path)
    with stages.open_trainer(config, "finetune", runtime) as opened:
        assert opened.state.step == 0
        found = whole_state(opened.model.dmp, opened.optimizer, runtime)
    for name in ("item_id", "user_id"):
        key = f"ebc.embedding_bags.{name}.weight"
        torch.testing.assert_close(found[f"weights {key}"], pretrained[f"model {key}"], rtol=0, atol=0)
        assert not found[f"state {key} {name}.momentum1"].any()


def test_a_stage_starts_from_a_checkpoint_of_another_run(stopped, data, runtime, tmp_path):
    source = newest(stopped)
    config = config_in(tmp_path, data, f"stages.joint.start_from={source.location}")
    expected = tensors_in(source, tmp_path)
    with stages.open_trainer(config, "joint", runtime) as opened:
        assert opened.state.step == 0
        found = whole_state(opened.model.dmp, opened.optimizer, runtime)
    assert {name.removeprefix("weights ") for name in found if name.startswith("weights ")} == {
        name.removeprefix("model ") for name in expected if name.startswith("model ")
    }
    for name, values in found.items():
        there = name.replace("weights ", "model ", 1).replace("state ", "optimizer state ", 1)
        torch.testing.assert_close(
            values, expected[there].reshape(values.shape).to(values.dtype), rtol=0, atol=0
        )


def on_two_ranks(directory: Path, data: Path) -> None:
    """One run undisturbed, one that rank 1 is asked to stop, and one in which rank 1 is killed.

    What each rank saw of the first two is written to files, since the job has no result.
    """
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        with rows_trained() as rows:
            assert stages.run_stage(config_in(directory / "undisturbed", data), "joint", runtime)
        seen: dict[str, Any] = {"undisturbed rows": rows}
        stop = ask_to_stop if runtime.rank == 1 else lambda: None
        with (
            rows_trained() as rows,
            after_step(16, stop),
            stages.open_trainer(config_in(directory / "stopped", data), "joint", runtime) as opened,
        ):
            assert not opened.run()
            seen |= {"rows": rows, "state": whole_state(opened.model.dmp, opened.optimizer, runtime)}
        torch.save(seen, directory / f"seen-{runtime.rank}.pt")
        die = (lambda: os.kill(os.getpid(), signal.SIGKILL)) if runtime.rank == 1 else lambda: None
        with after_step(16, die):
            stages.run_stage(config_in(directory / "killed", data), "joint", runtime)


def go_on(
    directory: Path, data: Path, runtime: Runtime, plan: str, stop_after: int = STEPS
) -> dict[str, Any]:
    """Where a run stands as it is opened, and which rows it then trains up to a step."""
    with (
        rows_trained() as rows,
        after_step(stop_after, ask_to_stop),
        stages.open_trainer(config_in(directory, data, plan), "joint", runtime) as opened,
    ):
        state = whole_state(opened.model.dmp, opened.optimizer, runtime)
        scored = score_rows(opened.model.dmp, opened.valid_reader, runtime).rows
        opened.run()
    scores = dict(zip(scored.row_ids.tolist(), scored.probabilities.tolist(), strict=True))
    parts = runtime.gather((scores, rows))
    return {
        "state": state,
        "scores": {row: score for part, _ in parts for row, score in part.items()},
        "rows": [[row for _, part in parts for row in part[epoch]] for epoch in range(EPOCHS)],
        "step": opened.state.step,
    }


def go_on_on_two_ranks(directory: Path, data: Path) -> dict[str, Any]:
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        stages.run_stage(config_in(directory / "killed", data), "joint", runtime)
        return go_on(directory / "other plan", data, runtime, ROW_WISE)


def go_on_on_three_ranks(directory: Path, data: Path) -> dict[str, Any]:
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        return go_on(directory, data, runtime, ROW_WISE)


@pytest.fixture(scope="module")
def two_ranks(undisturbed: RunConfig, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks left their runs and what they saw of them."""
    directory = tmp_path_factory.mktemp("two-ranks")
    with pytest.raises(RanksFailedError, match="-9"):
        run_ranks(2, on_two_ranks, directory, data)
    return directory


@pytest.fixture(scope="module")
def seen(two_ranks: Path) -> list[dict[str, Any]]:
    """By rank: the rows that it trained undisturbed, those until the stop, and the whole state then."""
    return [torch.load(two_ranks / f"seen-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def under_another_plan(two_ranks: Path, data: Path) -> dict[str, Any]:
    """What two ranks saw who went on with the killed run, and under another plan with the stopped one."""
    shutil.copytree(two_ranks / "stopped", two_ranks / "other plan")
    first, _ = run_ranks(2, go_on_on_two_ranks, two_ranks, data)
    return first


def assert_same_position(
    found: dict[str, Any], state: dict[str, torch.Tensor], scores: dict[int, float]
) -> None:
    assert_same_state(found["state"], state)
    assert found["scores"].keys() == scores.keys()
    assert found["scores"] == pytest.approx(scores, abs=1e-6)


def test_two_ranks_end_like_undisturbed_ones_after_one_was_killed(
    two_ranks, under_another_plan, data, tmp_path
):
    config, undisturbed = (config_in(two_ranks / name, data) for name in ("killed", "undisturbed"))
    assert_same_end(config, undisturbed, tmp_path)


def test_a_request_to_one_rank_stops_all_after_the_same_step(two_ranks, data):
    config = config_in(two_ranks / "stopped", data)
    assert newest(config).step in (16, 17)
    assert steps_of(config)[-1] == newest(config).step


def test_a_run_goes_on_from_two_ranks_to_one_and_to_three(
    seen, under_another_plan, two_ranks, data, runtime, tmp_path
):
    rows = [[row for rank in seen for row in rank["rows"][epoch]] for epoch in range(EPOCHS)]
    assert Counter(rows[0]) == EVERY_ROW
    shutil.copytree(two_ranks / "stopped" / "run", tmp_path / "run")
    on_one = go_on(tmp_path, data, runtime, TABLE_WISE, stop_after=19)
    assert_same_position(on_one, seen[0]["state"], under_another_plan["scores"])
    shutil.copytree(tmp_path / "run", tmp_path / "again" / "run")
    as_left = go_on(tmp_path / "again", data, runtime, TABLE_WISE, stop_after=1)
    ranks = run_ranks(3, go_on_on_three_ranks, tmp_path, data)
    for on_three in ranks:
        assert_same_position(on_three, as_left["state"], as_left["scores"])
    assert Counter(rows[1] + on_one["rows"][1] + ranks[0]["rows"][1]) == EVERY_ROW
    assert on_one["step"] in (19, 20)
    assert ranks[0]["step"] >= STEPS


def test_a_run_goes_on_under_another_plan(seen, under_another_plan):
    assert_same_state(under_another_plan["state"], seen[0]["state"])
    rows = [row for rank in seen for row in rank["rows"][1]]
    assert Counter(rows + under_another_plan["rows"][1]) == EVERY_ROW
    assert under_another_plan["step"] == STEPS


def train_by_uneven_batches(directory: Path, data: Path) -> list[int]:
    config = config_in(directory, data, "train.batch_size=211", "train.max_steps=2")
    with start_runtime("cpu") as runtime:
        stages.run_stage(config, "joint", runtime)
    return [line["rows"] for line in log_of(config) if line["event"] == "train"]


def test_the_log_counts_the_rows_that_the_ranks_can_share(tmp_path, data):
    assert run_ranks(2, train_by_uneven_batches, tmp_path, data)[0] == [210, 420]
