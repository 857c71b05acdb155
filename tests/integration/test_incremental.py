"""Training over periods, from raw files to the table: all ways, interrupted, on ranks, and refused."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from multirank import run_ranks
from tiny_run import files_below, tiny_config

from hetegen_rec import jobs
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.incremental import StaleIdsConfig, Way
from hetegen_rec.config.loading import load_config, parse_config
from hetegen_rec.config.run import RunConfig
from hetegen_rec.data.raw import expand_paths
from hetegen_rec.data.staleness import Staleness
from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.distributed.sharding import table_weights
from hetegen_rec.evaluation.results import read_evaluation
from hetegen_rec.jobs import Job
from hetegen_rec.training import stages
from hetegen_rec.training.attempts import read_done
from hetegen_rec.training.incremental import Update, open_sequence

SETTINGS = (
    "stages.scratch.epochs=2",
    "stages.joint.epochs=2",
    "stages.scratch.warmup=0",
    "incremental.periods=4",
    "incremental.valid_share=0.2",
    "incremental.replay_rows=40",
    "data.source.rows=2000",
    "distributed.timeout_seconds=60",
)
WAYS = ("finetune", "retrain", "fesail")


def config_in(directory: Path, *overrides: str) -> RunConfig:
    return tiny_config(directory, *SETTINGS, *overrides)


def follow(config: RunConfig, *, fresh: bool = False) -> dict[str, Any]:
    """Runs the verb; returns incremental.json."""
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        jobs.incremental(Job(config, runtime, fresh=fresh))
    content: dict[str, Any] = json.loads(
        (Path(config.run_dir) / "incremental" / "incremental.json").read_text()
    )
    return content


def follow_by_fesail(directory: Path) -> dict[str, Any]:
    return follow(config_in(directory, "incremental.ways=[fesail]"))


def scores(content: dict[str, Any]) -> dict[tuple[Way | None, int], float]:
    return {(one["way"], one["tested_on"]): one["metrics"]["log_loss"] for one in content["updates"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    config = config_in(tmp_path_factory.mktemp("finished"))
    return config, follow(config)


def run_of(config: RunConfig, way: Way, period: int) -> Path:
    return Path(config.run_dir) / "incremental" / way / f"period-{period:02d}"


def times_in(patterns: tuple[str, ...]) -> np.ndarray:
    tables = [
        pq.read_table(path, columns=["timestamp"], partitioning=None) for path in expand_paths(patterns)
    ]
    return np.concatenate([table["timestamp"].to_numpy() for table in tables])


def test_every_model_is_tested_on_the_period_after_its_own(finished: tuple[RunConfig, dict]) -> None:
    _, content = finished
    expected = {(None, 2): 500, **{(way, period): 500 for way in WAYS for period in (3, 4)}}
    assert {(one["way"], one["tested_on"]): one["metrics"]["n"] for one in content["updates"]} == expected
    assert all(np.isfinite(score) for score in scores(content).values())
    assert set(content["means"]) == set(WAYS)
    for way in WAYS:
        of_way = [one["metrics"]["auc"] for one in content["updates"] if one["way"] == way]
        assert content["means"][way]["auc"] == pytest.approx(np.mean(of_way))


def test_each_way_trains_on_its_own_rows(finished: tuple[RunConfig, dict]) -> None:
    _, content = finished
    rows = {(one["way"], one["trained_up_to"]): one["train_rows"] for one in content["updates"]}
    assert rows[None, 1] == 400  # the newest fifth of 500 validates
    assert rows["finetune", 2] == rows["finetune", 3] == 500
    assert (rows["retrain", 2], rows["retrain", 3]) == (900, 1400)
    for one in content["updates"]:
        if one["way"] == "fesail":
            assert 0 < one["replay"]["rows"] <= 40
            assert one["train_rows"] == 500 + one["replay"]["rows"]


def test_no_model_sees_rows_of_the_time_that_it_is_tested_on(finished: tuple[RunConfig, dict]) -> None:
    config, _ = finished
    with start_runtime("cpu") as runtime:
        for update in open_sequence(config, runtime).updates():
            data = update.config.data
            train, valid, test = (times_in(paths) for paths in (data.train, data.valid, data.test))
            assert train.max() < valid.min() <= valid.max() < test.min()


def test_finetuning_goes_on_and_retraining_does_not(finished: tuple[RunConfig, dict]) -> None:
    config, _ = finished
    with start_runtime("cpu") as runtime:
        updates = list(open_sequence(config, runtime).updates())
    starts = {(update.way, update.period): update.config.stage("scratch").start_from for update in updates}
    first = Path(config.run_dir) / "incremental" / "first" / "scratch"
    evaluation = read_evaluation(first)
    assert evaluation is not None
    assert starts[None, 1] is starts["retrain", 2] is None
    assert starts["finetune", 2] == starts["fesail", 2] == evaluation["checkpoint"]
    assert str(starts["finetune", 3]).startswith(str(run_of(config, "finetune", 2)))
    epochs = {update.way: update.config.stage("scratch").epochs for update in updates}
    assert epochs == {None: 2, "finetune": 1, "retrain": 2, "fesail": 1}


def test_only_fesail_holds_ids_and_those_that_it_replays_are_stale(finished: tuple[RunConfig, dict]) -> None:
    config, _ = finished
    with start_runtime("cpu") as runtime:
        updates = list(open_sequence(config, runtime).updates())
    assert {update.way for update in updates if update.config.stage("scratch").stale_ids} == {"fesail"}
    older, newer = (
        Staleness.load(run_of(config, "fesail", period) / "replay" / "staleness") for period in (2, 3)
    )
    ages = newer.by_table["user_id"]
    assert ages.max() == 2
    long_away = np.flatnonzero(ages == 2)
    assert (older.by_table["user_id"][long_away] == 1).all()


def test_the_same_command_again_trains_nothing(finished: tuple[RunConfig, dict]) -> None:
    config, content = finished
    runs = Path(config.run_dir) / "incremental"
    with mock.patch.object(stages, "open_trainer", side_effect=AssertionError):
        before = files_below(runs)
        assert follow(config) == content
    changed = {Path(name).name for name, digest in files_below(runs).items() if before[name] != digest}
    assert changed <= {"settings.json", ".scratch.lock"}  # which job it was
    assert (runs / "incremental.html").exists()


def test_results_are_of_the_own_strategy_whatever_a_model_was_evaluated_by_since(
    finished: tuple[RunConfig, dict],
) -> None:
    config, content = finished
    directory = run_of(config, "finetune", 3)
    settings = load_config(directory / "scratch" / "config.yaml")
    by_paths = {"strategy": "feature_paths", "dropped": "out_of_vocabulary"}
    other = parse_config(settings.model_dump() | {"inference": by_paths}, "other")
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        jobs.evaluate(Job(other, runtime, stage="scratch", with_report=False))
    assert follow(config) == content


class _CutOffError(Exception):
    pass


def test_an_interrupted_sequence_ends_as_an_undisturbed_one(
    finished: tuple[RunConfig, dict], tmp_path: Path
) -> None:
    config = config_in(tmp_path)
    run_stage = stages.run_stage
    trained: list[str] = []

    def cut_off(run: RunConfig, *arguments: Any, **options: Any) -> bool:
        if len(trained) == 4:
            raise _CutOffError
        trained.append(run.name)
        return run_stage(run, *arguments, **options)

    with mock.patch.object(stages, "run_stage", cut_off), pytest.raises(_CutOffError):
        follow(config)
    assert trained == ["tiny first 1", "tiny finetune 2", "tiny retrain 2", "tiny fesail 2"]
    shutil.rmtree(run_of(config, "fesail", 2) / "scratch")  # as if it had not come to its end
    assert scores(follow(config)) == scores(finished[1])


def test_a_stop_ends_the_sequence_after_the_step(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with mock.patch.object(stages, "run_stage", return_value=False) as run_stage:
        with start_runtime("cpu") as runtime:
            jobs.incremental(Job(config, runtime))
        run_stage.assert_called_once()
    assert not (Path(config.run_dir) / "incremental" / "incremental.json").exists()


def test_two_ranks_replay_the_rows_that_one_does(finished: tuple[RunConfig, dict], tmp_path: Path) -> None:
    first, second = run_ranks(2, follow_by_fesail, tmp_path)
    assert first == second
    alone, both = (
        [one for one in content["updates"] if one["way"] in ("fesail", None)]
        for content in (finished[1], first)
    )
    for key in ("replay", "train_rows", "tested_on"):
        assert [one[key] for one in both] == [one[key] for one in alone]
    # The rows are in other files, so they are shuffled in another way.
    assert [one["metrics"]["log_loss"] for one in both] == pytest.approx(
        [one["metrics"]["log_loss"] for one in alone], abs=0.05
    )


def test_joint_training_can_follow_a_log_too(tmp_path: Path) -> None:
    content = follow(
        config_in(tmp_path, "incremental.stage=joint", "incremental.ways=[fesail]", "incremental.periods=3")
    )
    assert [one["way"] for one in content["updates"]] == [None, "fesail"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("features.timestamp=null",), r"features\.timestamp"),
        (("stages.scratch.start_from=x",), r"`stages\.scratch\.start_from` says"),
        (("data.keep_ids_of=x",), r"`data\.keep_ids_of` says"),
        (("incremental.period_length=1", "incremental.periods=8"), "into 2000 period.*unit of the timestamp"),
    ],
    ids=["no timestamp", "start_from", "keep_ids_of", "wrong unit"],
)
def test_runs_that_cannot_follow_a_log_are_refused(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    config = config_in(tmp_path, *overrides)
    with pytest.raises(ConfigError, match=message):
        follow(config)
    assert not (Path(config.run_dir) / "incremental" / "settings.json").exists()


def test_other_settings_need_a_fresh_start(finished: tuple[RunConfig, dict], tmp_path: Path) -> None:
    directory = Path(finished[0].run_dir).parent
    shutil.copytree(directory, tmp_path / "copy")
    config = config_in(tmp_path / "copy", "incremental.epochs=2")
    shutil.rmtree(tmp_path / "copy" / "run" / "incremental" / "periods")  # as they name files elsewhere
    with pytest.raises(ConfigError, match=r"`incremental\.epochs` was 1, is 2.*--fresh"):
        follow(config)
    follow(config, fresh=True)
    with start_runtime("cpu") as runtime:
        update: Update = list(open_sequence(config, runtime).updates())[1]
    assert update.way == "finetune"
    assert read_done(update.config, "scratch")["steps"] == 6


def movements(config: RunConfig, directory: Path, stale_ids: StaleIdsConfig | None) -> np.ndarray:
    """How far each user's row moves in one update that is trained like `config`, holding ids or not."""
    values = config.model_dump() | {"run_dir": str(directory)}
    values["stages"]["scratch"]["stale_ids"] = stale_ids and stale_ids.model_dump()
    with start_runtime("cpu") as runtime:
        run = parse_config(values, "test")
        with stages.open_trainer(run, "scratch", runtime) as trainer:
            weights = table_weights(trainer.model.dmp)["user_id"].local_shards()[0].tensor
            before = weights.clone()
            trainer.run()
            return (weights - before).norm(dim=1).numpy()


def test_rows_of_stale_ids_move_less(finished: tuple[RunConfig, dict], tmp_path: Path) -> None:
    config, _ = finished
    with start_runtime("cpu") as runtime:
        update = next(one for one in open_sequence(config, runtime).updates() if one.way == "fesail")
    held = update.config.stage("scratch").stale_ids
    assert held is not None
    ages = Staleness.load(held.directory).by_table["user_id"]
    free = movements(update.config, tmp_path / "free", None)
    tight = movements(update.config, tmp_path / "tight", held.model_copy(update={"regularisation": 9.0}))
    replayed = np.flatnonzero((ages > 0) & (free[: len(ages)] > 0))
    active = np.flatnonzero((ages == 0) & (free[: len(ages)] > 0))
    assert len(replayed) > 5
    assert tight[replayed].mean() < 0.3 * free[replayed].mean()
    assert tight[active].mean() == pytest.approx(free[active].mean(), rel=0.1)
