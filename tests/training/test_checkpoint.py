"""Reading checkpoints: which are complete and intact, on which ranks and plans they load, what is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from multirank import run_ranks
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer
from toy_checkpoints import ToyCheckpoints, assert_same_state, state_of, warnings_told
from toy_model import TABLES, Job

from hetegen_rec.config import Schema
from hetegen_rec.config.schema import Field
from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.sealing import sealed, unsealed
from hetegen_rec.training.checkpoint import CheckpointError, full_schema_fingerprint, read_info
from hetegen_rec.training.checkpoint_writer import Best

TRAINED = 3
WRITTEN_UNDER = ("table_wise", "data_parallel")


def write(directory: Path) -> dict[str, Any]:
    """Trains and saves under each plan; state and scores then, and scores one step later."""
    seen: dict[str, Any] = {}
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        for plan in WRITTEN_UNDER:
            job = Job(runtime, plan)
            job.train(TRAINED)
            ToyCheckpoints(directory / plan, job).save(TRAINED)
            seen[plan] = {"state": state_of(job), "scores": job.scores()}
            job.train(1)
            seen[plan]["next"] = job.scores()
    return seen


def read(directory: Path, plans: list[str], refused: list[str]) -> dict[str, Any]:
    """The same after loading each into jobs under other plans, or what was said instead."""
    seen: dict[str, Any] = {}
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        for source in WRITTEN_UNDER:
            for plan in [*plans, *refused]:
                job = Job(runtime, plan)
                job.train(1)  # away from the initial weights and an empty state
                checkpoints = ToyCheckpoints(directory / source, job)
                if plan in refused:
                    before = job.scores()
                    with pytest.raises(CheckpointError) as raised:
                        checkpoints.load()
                    seen[source, plan] = {"error": str(raised.value), "untouched": before == job.scores()}
                    continue
                checkpoints.load()
                found = {"state": state_of(job), "scores": job.scores()}
                job.train(1)
                seen[source, plan] = {**found, "next": job.scores()}
    return seen


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def written(directory: Path) -> dict[str, Any]:
    first, *_ = run_ranks(2, write, directory)
    return first


def assert_taken_over(found: dict[str, Any], written: dict[str, Any]) -> None:
    assert_same_state(found["state"], written["state"])
    assert found["scores"] == pytest.approx(written["scores"], abs=1e-6)
    assert found["next"] == pytest.approx(written["next"], abs=1e-5)


def test_two_ranks_to_one(directory, written):
    plans = ["table_wise", "row_wise", "column_wise", "data_parallel"]
    found = read(directory, plans, refused=[])
    for source in WRITTEN_UNDER:
        for plan in plans:
            assert_taken_over(found[source, plan], written[source])
        assert written[source]["state"]["state ebc.embedding_bags.user.weight user.momentum1"].all()
        assert written[source]["state"]["state hidden.weight step"] == TRAINED


def test_two_ranks_to_three_under_other_plans(directory, written):
    plans, refused = ["table_wise", "row_wise", "data_parallel"], ["column_wise"]
    for found in run_ranks(3, read, directory, plans, refused):
        for source in WRITTEN_UNDER:
            for plan in plans:
                assert_taken_over(found[source, plan], written[source])
            assert (
                "row-wise Adagrad keeps one accumulator per row of each column shard"
                in (found[source, "column_wise"]["error"])
            )
            assert found[source, "column_wise"]["untouched"]


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with start_runtime("cpu") as runtime:
        yield runtime


@pytest.fixture(scope="module")
def job(runtime: Runtime) -> Job:
    return Job(runtime, "table_wise")


def counted_steps(optimizer: KeyedOptimizer) -> list[int]:
    """Steps that the fused optimizers say they took, by which Adam corrects its moments."""
    if isinstance(optimizer, CombinedOptimizer):
        return [steps for _, part in optimizer.optimizers for steps in counted_steps(part)]
    kernel = getattr(optimizer, "_emb_module", None)
    return [] if kernel is None else [int(kernel.iter)]


def test_fused_optimizers_go_on_counting_steps(runtime, tmp_path):
    written = Job(runtime, "table_wise")
    ToyCheckpoints(tmp_path, written).save(TRAINED)
    loaded = Job(runtime, "table_wise")
    assert set(counted_steps(loaded.optimizer)) == {0}
    ToyCheckpoints(tmp_path, loaded).load()
    assert set(counted_steps(loaded.optimizer)) == {TRAINED}


def test_a_place_without_checkpoints(job, tmp_path):
    checkpoints = ToyCheckpoints(tmp_path / "absent", job).checkpoints
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    (tmp_path / "absent").mkdir()
    assert checkpoints.latest() is None


def test_a_checkpoint_says_what_it_holds(job, tmp_path):
    toy = ToyCheckpoints(tmp_path, job)
    toy.save(7, best=Best("auc", 0.75), stage="joint", state={"step": 7})
    info = read_info(f"{tmp_path}/step-7")
    assert info == toy.checkpoints.latest() == toy.checkpoints.best()
    assert (info.location, info.step, info.world_size) == (f"{tmp_path}/step-7", 7, 1)
    assert info.metadata == {"stage": "joint", "state": {"step": 7}}
    assert info.best == {"metric": "auc", "value": 0.75}
    assert info.tables == {name: (rows, 8) for name, rows in TABLES.items()}
    assert info.optimizer_state["state.ebc.embedding_bags.item.weight.item.momentum1"] == (23,)
    files = {path.name: path.stat().st_size for path in (tmp_path / "step-7").iterdir()}
    del files["metadata.json"]
    assert {name: about["bytes"] for name, about in info.files.items()} == files


def test_one_that_was_begun_only_is_none(job, tmp_path):
    toy = ToyCheckpoints(tmp_path, job)
    toy.save(1, 2, best=Best("auc", 0.75))
    (tmp_path / "step-2" / "metadata.json").unlink()
    (tmp_path / "step-30").mkdir()
    assert toy.checkpoints.latest() == toy.checkpoints.best() == read_info(f"{tmp_path}/step-1")
    with pytest.raises(CheckpointError, match=r"step-2: no complete checkpoint \(metadata\.json: .*\); name"):
        toy.checkpoints.check(f"{tmp_path}/step-2")


def shards_of(checkpoint: Path) -> Path:
    (path,) = checkpoint.glob("*.distcp")
    return path


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_a_digit(path: Path) -> None:
    text = path.read_text()
    assert '"step": 2,' in text
    path.write_text(text.replace('"step": 2,', '"step": 3,'))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "shards cut off": (lambda path: cut_off(shards_of(path)), r"__0_0\.distcp has .* of .* bytes"),
    "a bit of the shards flipped": (
        lambda path: flip_a_bit(shards_of(path)),
        r"__0_0\.distcp was changed: its checksum does not fit",
    ),
    "shards missing": (lambda path: shards_of(path).unlink(), r"__0_0\.distcp cannot be read"),
    "a bit of DCP's index flipped": (
        lambda path: flip_a_bit(path / ".metadata"),
        r"\.metadata was changed: its checksum does not fit",
    ),
    "DCP's index missing": (lambda path: (path / ".metadata").unlink(), r"\.metadata cannot be read"),
    "metadata.json cut off": (lambda path: cut_off(path / "metadata.json"), r"no complete .*metadata\.json"),
    "metadata.json empty": (
        lambda path: (path / "metadata.json").write_bytes(b""),
        r"no complete .*metadata\.json",
    ),
    "metadata.json no text": (
        lambda path: (path / "metadata.json").write_bytes(b"\xff\xfe\x00"),
        r"no complete .*metadata\.json",
    ),
    "a digit of metadata.json changed": (
        lambda path: change_a_digit(path / "metadata.json"),
        r"no complete .*metadata\.json: its own checksum does not fit",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_one_is_told_of_and_the_one_before_taken(damage, message, job, tmp_path):
    toy = ToyCheckpoints(tmp_path, job)
    toy.save(1)
    toy.save(2, best=Best("auc", 0.75))
    before, damaged = (read_info(f"{tmp_path}/step-{step}") for step in (1, 2))
    damage(tmp_path / "step-2")
    with pytest.raises(CheckpointError, match=message) as raised:
        toy.checkpoints.check(damaged.location)
    assert str(raised.value).startswith(f"{tmp_path}/step-2: ")
    for find in (toy.checkpoints.latest, toy.checkpoints.best):
        with warnings_told("checkpoint") as told:
            assert find() == before
        assert f"{raised.value}; passed over" in told


def test_where_all_are_damaged_is_not_taken_for_an_empty_place(job, tmp_path):
    toy = ToyCheckpoints(tmp_path, job)
    toy.save(1, 2)
    cut_off(shards_of(tmp_path / "step-1"))
    cut_off(tmp_path / "step-2" / "metadata.json")
    for find in (toy.checkpoints.latest, toy.checkpoints.best):
        with pytest.raises(CheckpointError, match=r"none of its 2 checkpoint\(s\) can be read.*--fresh"):
            find()


class UnreachableError(Exception):
    """Of an object store's own kind, and not to be pickled."""

    def __reduce__(self):
        raise TypeError


@pytest.mark.parametrize("method", ["ls", "info"])
def test_a_place_that_cannot_be_read_is_not_taken_for_an_empty_one(method, job, tmp_path):
    toy = ToyCheckpoints(tmp_path, job)
    toy.save(1)
    with mock.patch.object(LocalFileSystem, method, side_effect=UnreachableError("no route to host")):
        for find in (toy.checkpoints.latest, toy.checkpoints.best):
            with pytest.raises(CheckpointError, match="cannot be read: UnreachableError: no route to host"):
                find()


def check_damaged(directory: Path) -> tuple[str, int]:
    """What a rank says of the newest checkpoint, and which one it takes."""
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        toy = ToyCheckpoints(directory, Job(runtime, "table_wise"))
        toy.save(1, 2)
        with runtime.together("damaging"):
            if runtime.is_main:
                cut_off(directory / "step-2" / "__1_0.distcp")
                flip_a_bit(directory / "step-2" / "__0_0.distcp")
        with pytest.raises(CheckpointError) as raised:
            toy.checkpoints.check(str(directory / "step-2"))
        newest = toy.checkpoints.latest()
        assert newest is not None
        return str(raised.value), newest.step


def test_every_rank_tells_of_all_damage_and_takes_the_same_one(tmp_path):
    first, second = run_ranks(2, check_damaged, tmp_path)
    assert first == second
    message, taken = first
    assert "__0_0.distcp was changed" in message
    assert "__1_0.distcp has" in message
    assert taken == 1


def test_clear_removes_all(job, tmp_path):
    toy = ToyCheckpoints(tmp_path, job)
    toy.save(1, 2)
    (tmp_path / "step-2" / "metadata.json").unlink()
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    toy.checkpoints.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def saved_by(job: Job, directory: Path) -> ToyCheckpoints:
    toy = ToyCheckpoints(directory, job)
    toy.save(1)
    return toy


def test_another_schema_is_refused_by_table(runtime, job, tmp_path):
    saved_by(job, tmp_path)
    other = Job(runtime, "table_wise", tables=TABLES | {"item": 1700})
    before = other.scores()
    with pytest.raises(CheckpointError, match="table item has 23 rows of 8 there, has 1,700 rows of 8 here"):
        ToyCheckpoints(tmp_path, other).load()
    assert other.scores() == before


def test_another_fingerprint_is_refused_though_the_tables_fit(job, tmp_path):
    saved_by(job, tmp_path)
    with pytest.raises(CheckpointError, match="fingerprint toy there, other here"):
        ToyCheckpoints(tmp_path, job, fingerprint="other").load()


def test_another_table_optimizer_is_refused_but_weights_load(runtime, job, tmp_path):
    info = saved_by(job, tmp_path).checkpoints.latest()
    other = Job(runtime, "table_wise", "adagrad")
    other.train(1)
    checkpoints = ToyCheckpoints(tmp_path, other).checkpoints
    with pytest.raises(CheckpointError, match=r"restore train\.table_optimizer"):
        checkpoints.load(info, other.model, other.optimizer)
    checkpoints.load(info, other.model)
    assert other.scores() == job.scores()


def test_another_network_is_refused(runtime, job, tmp_path):
    saved_by(job, tmp_path)
    other = Job(runtime, "table_wise")
    other.model.module.score = torch.nn.Linear(4, 2)
    with pytest.raises(CheckpointError, match=r"does not fit this model.*model section"):
        ToyCheckpoints(tmp_path, other).load()


def test_a_network_with_more_parameters_than_this_is_refused(runtime, tmp_path):
    """DCP would load what both have and say nothing."""
    larger = Job(runtime, "table_wise")
    larger.model.module.second_score = torch.nn.Linear(4, 1)
    saved_by(larger, tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks second_score\.bias and 1 more .*model section"):
        ToyCheckpoints(tmp_path, Job(runtime, "table_wise")).load()


def test_another_format_is_refused(job, tmp_path):
    saved_by(job, tmp_path)
    path = tmp_path / "step-1" / "metadata.json"
    path.write_text(sealed({**unsealed(path.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match=r"checkpoint format 99, but this version reads \d+; load it"):
        read_info(f"{tmp_path}/step-1")


def test_json_that_is_no_checkpoint_is_none(tmp_path):
    for content in ([], "text", {"step": 1}):
        (tmp_path / "metadata.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            read_info(str(tmp_path))


def test_fingerprints_differ_with_the_schema():
    fields = (Field(name="user", kind="id"),)
    schema = Schema(label="click", fields=fields)
    assert full_schema_fingerprint(schema) == full_schema_fingerprint(Schema(label="click", fields=fields))
    other = Schema(label="click", fields=(Field(name="user", kind="id", min_count=2),))
    assert full_schema_fingerprint(schema) != full_schema_fingerprint(other)
