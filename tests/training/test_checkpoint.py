import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from multirank import run_ranks
from toy_model import TABLES, Job

from hetegen_rec.config import Schema
from hetegen_rec.config.schema import Field
from hetegen_rec.distributed.runtime import DistributedError, Runtime, start_runtime
from hetegen_rec.training.checkpoint import CheckpointError, Checkpoints, read_info, schema_fingerprint

TRAINED = 3


def _state(job: Job) -> dict[str, Any]:
    """The optimizer's whole state by table, put together from all ranks' shards; rows as lists."""
    whole = {}
    for name in TABLES:
        # A rank without a part of the table has no state for it.
        states = job.optimizer.state_dict()["state"].get(f"ebc.embedding_bags.{name}.weight", {})
        mine = [
            (shard.metadata.shard_offsets[0], shard.tensor.tolist())
            for state in states.values()
            for shard in state.local_shards()
        ]
        parts = sorted(part for rank in job.runtime.gather(mine) for part in rank)
        whole[name] = [value for _, values in parts for value in values]
    dense = job.optimizer.state_dict()["state"]["hidden.weight"]
    return {**whole, "step": dense["step"].item(), "exp_avg_sq": dense["exp_avg_sq"].tolist()}


def _checkpoints(directory: Path, runtime: Runtime, keep: int = 2, fingerprint: str = "toy") -> Checkpoints:
    return Checkpoints(directory, runtime, keep, fingerprint)


def _write(directory: Path) -> dict[str, Any]:
    """Trains under table-wise sharding, saves, trains on; then fails to save on rank 0."""
    seen: dict[str, Any] = {}
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        job = Job(runtime, "table_wise")
        job.train(TRAINED)
        checkpoints = _checkpoints(directory, runtime)
        checkpoints.save(TRAINED, job.model, job.optimizer, {"epoch": 1})
        seen["latest"] = checkpoints.latest()
        seen["scores"], seen["state"] = job.scores(), _state(job)
        job.train(1)
        seen["next"] = job.scores()
        try:
            broken = {"cursor": object()} if runtime.is_main else {}
            checkpoints.save(TRAINED + 1, job.model, job.optimizer, broken)
        except (TypeError, DistributedError) as error:
            seen["error"] = f"{type(error).__name__}: {error}"
    return seen


def _read(directory: Path, kinds: list[str], weights_only: list[str]) -> dict[str, Any]:
    """Scores and optimizer state after loading under other plans."""
    seen: dict[str, Any] = {}
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        checkpoints = _checkpoints(directory, runtime)
        path = checkpoints.latest()
        assert path is not None
        for kind in [*kinds, *weights_only]:
            job = Job(runtime, kind)
            job.train(1)  # away from the initial weights and an empty state
            if kind in kinds:
                checkpoints.load(path, job.model, job.optimizer)
                found = {"scores": job.scores(), "state": _state(job)}
                job.train(1)
                seen[kind] = {**found, "next": job.scores()}
                continue
            try:
                checkpoints.load(path, job.model, job.optimizer)
            except (CheckpointError, DistributedError) as error:
                seen["error"] = str(error)
            checkpoints.load(path, job.model)
            seen[kind] = {"scores": job.scores()}
    return seen


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def written(directory: Path) -> list[dict[str, Any]]:
    return run_ranks(2, _write, directory)


def _assert_same(found: dict[str, Any], written: dict[str, Any]) -> None:
    assert found["scores"] == pytest.approx(written["scores"], abs=1e-6)
    if "state" not in found:
        return
    assert found["state"]["step"] == TRAINED
    for name in [*TABLES, "exp_avg_sq"]:
        torch.testing.assert_close(
            torch.tensor(found["state"][name]), torch.tensor(written["state"][name]), rtol=0, atol=0
        )
    assert any(written["state"]["user"])
    assert found["next"] == pytest.approx(written["next"], abs=1e-5)


def test_two_ranks_to_one(directory: Path, written: list[dict[str, Any]]) -> None:
    found = _read(directory, ["table_wise", "row_wise"], ["data_parallel"])
    for kind in ("table_wise", "row_wise", "data_parallel"):
        _assert_same(found[kind], written[0])


def test_two_ranks_to_three_under_other_plans(directory: Path, written: list[dict[str, Any]]) -> None:
    ranks = run_ranks(3, _read, directory, ["table_wise", "row_wise"], ["column_wise"])
    for found in ranks:
        for kind in ("table_wise", "row_wise", "column_wise"):
            _assert_same(found[kind], written[0])
        assert "optimizer state" in found["error"]
        assert "distributed.tables" in found["error"]


def test_a_failed_save_reaches_every_rank_and_leaves_no_checkpoint(
    directory: Path, written: list[dict[str, Any]]
) -> None:
    assert written[0]["error"].startswith("TypeError")
    assert written[1]["error"].startswith("PeerFailedError: finishing")
    assert written[0]["latest"] == written[1]["latest"] == directory / f"step-{TRAINED}"
    assert not (directory / f"step-{TRAINED + 1}").exists()


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with start_runtime("cpu") as runtime:
        yield runtime


@pytest.fixture(scope="module")
def job(runtime: Runtime) -> Job:
    return Job(runtime, "table_wise")


def test_an_empty_directory_has_no_checkpoints(runtime: Runtime, tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path / "absent", runtime)
    assert checkpoints.latest() is None
    assert checkpoints.best() is None


def test_newest_and_best_are_kept(runtime: Runtime, job: Job, tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path, runtime, keep=2)
    for step in (2, 9, 10, 30, 100):
        checkpoints.save(step, job.model, job.optimizer, {})
        if step == 9:
            checkpoints.mark_best(9, "auc", 0.75)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.json", "step-100", "step-30", "step-9"]
    assert checkpoints.best() == tmp_path / "step-9"
    assert checkpoints.latest() == tmp_path / "step-100"


def test_a_torn_checkpoint_is_not_the_latest(runtime: Runtime, job: Job, tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path, runtime)
    for step in (1, 2):
        checkpoints.save(step, job.model, job.optimizer, {})
    (tmp_path / "step-2" / "metadata.json").unlink()
    (tmp_path / "step-3.tmp").mkdir()
    assert checkpoints.latest() == tmp_path / "step-1"
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoints.load(tmp_path / "step-2", job.model)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoints.mark_best(2, "auc", 0.7)


def test_a_step_saved_again_is_replaced(runtime: Runtime, job: Job, tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path, runtime)
    for epoch in (1, 2):
        path = checkpoints.save(7, job.model, job.optimizer, {"epoch": epoch})
    info = read_info(path)
    assert (info.step, info.world_size, info.metadata) == (7, 1, {"epoch": 2})
    assert info.tables == {name: (rows, 8) for name, rows in TABLES.items()}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-7"]


def test_another_schema_is_refused_by_table(runtime: Runtime, job: Job, tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path, runtime)
    path = checkpoints.save(1, job.model, job.optimizer, {})
    other = Job(runtime, "table_wise", tables=TABLES | {"item": 1700})
    before = other.scores()
    with pytest.raises(CheckpointError, match="table item has 23 rows of 8 there, has 1,700 rows of 8 here"):
        checkpoints.load(path, other.model)
    assert other.scores() == before
    with pytest.raises(CheckpointError, match="fingerprint toy there, other here"):
        _checkpoints(tmp_path, runtime, fingerprint="other").load(path, job.model)


def test_another_table_optimizer_is_refused(runtime: Runtime, job: Job, tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path, runtime)
    path = checkpoints.save(1, job.model, job.optimizer, {})
    other = Job(runtime, "table_wise", "adagrad")
    with pytest.raises(CheckpointError, match=r"train\.table_optimizer"):
        checkpoints.load(path, other.model, other.optimizer)
    checkpoints.load(path, other.model)
    assert other.scores() == job.scores()


def test_another_network_is_refused(runtime: Runtime, job: Job, tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path, runtime)
    path = checkpoints.save(1, job.model, job.optimizer, {})
    other = Job(runtime, "table_wise")
    other.model.module.score = torch.nn.Linear(4, 2)
    with pytest.raises(CheckpointError, match="model section"):
        checkpoints.load(path, other.model)


def test_another_format_is_refused(runtime: Runtime, job: Job, tmp_path: Path) -> None:
    path = _checkpoints(tmp_path, runtime).save(1, job.model, job.optimizer, {})
    values = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        read_info(path)


def test_fingerprints_differ_with_the_schema() -> None:
    fields = (Field(name="user", kind="id"),)
    schema = Schema(label="click", fields=fields)
    assert schema_fingerprint(schema) == schema_fingerprint(Schema(label="click", fields=fields))
    other = Schema(label="click", fields=(Field(name="user", kind="id", min_count=2),))
    assert schema_fingerprint(schema) != schema_fingerprint(other)
