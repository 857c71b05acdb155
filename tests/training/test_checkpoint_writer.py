"""Writing checkpoints while training goes on: what is in them, what stays, and writes that fail."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from multirank import run_ranks
from toy_checkpoints import Gate, ToyCheckpoints, assert_same_state, full_disk, state_of, warnings_told
from toy_model import TABLES, Job

from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.training.checkpoint import CheckpointError, read_info
from hetegen_rec.training.checkpoint_writer import Best


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with start_runtime("cpu") as runtime:
        yield runtime


@pytest.fixture
def job(runtime: Runtime) -> Job:
    return Job(runtime, "table_wise")


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_newest_and_best_are_kept(job, tmp_path):
    toy = ToyCheckpoints(tmp_path, job, keep=2)
    for step in (2, 9, 10, 30, 100):
        toy.save(step, best=Best("auc", 0.75) if step in (2, 9) else None)
    assert names_in(tmp_path) == ["step-100", "step-30", "step-9"]
    assert toy.checkpoints.best() == read_info(f"{tmp_path}/step-9")
    assert toy.checkpoints.latest() == read_info(f"{tmp_path}/step-100")


def test_a_step_saved_again_is_replaced_whole(job, tmp_path):
    toy = ToyCheckpoints(tmp_path, job)
    toy.save(7, epoch=1)
    (tmp_path / "step-7" / "__5_0.distcp").write_text("of a sixth rank of an earlier attempt")
    toy.save(7, epoch=2)
    assert read_info(f"{tmp_path}/step-7").metadata == {"epoch": 2}
    assert names_in(tmp_path) == ["step-7"]
    assert names_in(tmp_path / "step-7") == [".metadata", "__0_0.distcp", "metadata.json"]


def test_what_was_begun_only_is_removed_later(job, tmp_path):
    toy = ToyCheckpoints(tmp_path, job, keep=2)
    toy.save(1, 2)
    (tmp_path / "step-2" / "metadata.json").unlink()
    (tmp_path / "step-50").mkdir()
    toy.save(3)
    assert names_in(tmp_path) == ["step-1", "step-3"]


@pytest.mark.parametrize(
    "error", [OSError(errno.EBUSY, "Device or resource busy"), Exception("an object store's own")], ids=str
)
def test_what_cannot_be_removed_is_told_of_and_tried_again(error, job, tmp_path):
    toy = ToyCheckpoints(tmp_path, job, keep=1)
    toy.save(1)
    with (
        mock.patch.object(LocalFileSystem, "rm", side_effect=error),
        warnings_told("checkpoint_writer") as told,
    ):
        toy.save(2)
    assert told == [f"{tmp_path}/step-1 could not be removed, to be tried again: {error}"]
    assert toy.steps() == [2]  # no complete one that may lack files
    toy.save(3)
    assert names_in(tmp_path) == ["step-3"]


def test_saves_do_not_overlap(job, tmp_path):
    toy, gate = ToyCheckpoints(tmp_path, job), Gate()
    with gate.closed():
        toy.begin(1)
        gate.open_after(0.2)
        toy.begin(2)
        assert gate.events[:2] == ["begin", "end"]
        assert toy.steps()[:1] == [1]
        toy.begin(3)
        toy.writer.wait()
    assert gate.events == ["begin", "end"] * 3
    assert toy.steps() == [2, 3]


def save_while_training(job: Job, directory: Path) -> dict[str, Any]:
    """Saves, and trains on before anything is written; then loads what was."""
    toy, gate = ToyCheckpoints(directory, job), Gate()
    job.train(2)
    seen: dict[str, Any] = {"then": state_of(job)}
    with gate.closed():
        toy.begin(2)
        job.train(2)
        seen["meanwhile"] = toy.steps()
    toy.writer.wait()
    seen["now"] = state_of(job)
    toy.load()
    return {**seen, "loaded": state_of(job)}


def fail_once(job: Job, directory: Path) -> dict[str, Any]:
    """The disk of the last rank is full for one write; what was told and found after each."""
    toy, seen = ToyCheckpoints(directory, job), {}
    toy.save(1)
    with full_disk(on_rank=_is_last(job)), warnings_told("checkpoint_writer") as told:
        toy.begin(2)
        job.train(1)
        toy.writer.wait()
    seen["told"], seen["after failure"] = list(told), _found(job, directory)
    seen["intact"] = toy.checkpoints.check(str(directory / "step-1")).step
    toy.save(3)
    return {**seen, "afterwards": _found(job, directory), "newest": toy.checkpoints.latest().step}


def fail_too_often(job: Job, directory: Path) -> dict[str, Any]:
    """Two writes may fail in a row; with a good one in between three did, then three in a row do."""
    toy, seen = ToyCheckpoints(directory, job, failed_writes_allowed=2), {}
    with full_disk(on_rank=_is_last(job)):
        toy.save(1, 2)
    toy.save(3)
    with full_disk(on_rank=_is_last(job)):
        toy.save(4, 5)
        toy.begin(6)
        with pytest.raises(CheckpointError) as raised:
            toy.writer.wait()
    return {**seen, "error": str(raised.value), "left": _found(job, directory)}


def fail_at_last(job: Job, directory: Path) -> dict[str, Any]:
    """The last write of a stage fails, the first one to do so."""
    toy = ToyCheckpoints(directory, job)
    toy.save(1)
    with full_disk(on_rank=_is_last(job)):
        toy.begin(2)
        with pytest.raises(CheckpointError) as raised:
            toy.writer.finish()
    return {"error": str(raised.value), "left": _found(job, directory)}


def save_by_url(job: Job, directory: Path) -> dict[str, Any]:
    """Into a place that is named by a URL; trains on, loads the newest and scores."""
    toy = ToyCheckpoints(f"file://{directory}", job)
    toy.save(1, 2, 3)
    saved = job.scores()
    job.train(1)
    info = toy.checkpoints.latest()
    toy.load(info)
    return {"location": info.location, "left": _found(job, directory), "same": job.scores() == saved}


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (save_while_training, fail_once, fail_too_often, fail_at_last, save_by_url)
}


def _is_last(job: Job) -> bool:
    return job.runtime.rank == job.runtime.world_size - 1


def _found(job: Job, directory: Path) -> list[str]:
    """As rank 0 finds it, which removes what failed, once it has done so."""
    return job.runtime.broadcast(names_in(directory))


def carry_out_all(directory: Path) -> dict[str, Any]:
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        return {
            name: scenario(Job(runtime, "table_wise"), directory / name)
            for name, scenario in SCENARIOS.items()
        }


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {ranks: tmp_path_factory.mktemp(f"ranks-{ranks}") for ranks in (1, 2)}


@pytest.fixture(scope="module")
def outcomes(places: dict[int, Path], runtime: Runtime) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks: what each saw of the scenarios."""
    alone = {
        name: scenario(Job(runtime, "table_wise"), places[1] / name) for name, scenario in SCENARIOS.items()
    }
    return {1: [alone], 2: run_ranks(2, carry_out_all, places[2])}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_holds_the_moment_at_which_it_was_asked_for(ranks, outcomes):
    for seen in (rank["save_while_training"] for rank in outcomes[ranks]):
        assert seen["meanwhile"] == []
        assert_same_state(seen["loaded"], seen["then"])
        changed = [name for name, values in seen["now"].items() if not values.equal(seen["then"][name])]
        assert {"weights ebc.embedding_bags.item.weight", "state hidden.weight exp_avg"} <= set(changed)


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_goes_on_after_a_failed_write_which_leaves_nothing(ranks, outcomes, places):
    for rank, seen in enumerate(rank["fail_once"] for rank in outcomes[ranks]):
        if rank == 0:
            (told,) = seen["told"]
            path = places[ranks] / "fail_once" / "step-2"
            assert told.startswith(f"checkpoint {path} could not be written, training goes on: ")
            assert f"rank {ranks - 1}: [Errno 28] No space left on device" in told
        else:
            assert seen["told"] == []
        assert seen["after failure"] == ["step-1"]
        assert seen["intact"] == 1
        assert seen["afterwards"] == ["step-1", "step-3"]
        assert seen["newest"] == 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_failures_in_a_row_end_training_on_every_rank(ranks, outcomes):
    for seen in (rank["fail_too_often"] for rank in outcomes[ranks]):
        assert "3 checkpoint(s) in a row could not be written, the last because of: rank" in seen["error"]
        assert "No space left on device" in seen["error"]
        assert seen["left"] == ["step-3"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_last_one_may_not_fail(ranks, outcomes):
    for seen in (rank["fail_at_last"] for rank in outcomes[ranks]):
        assert "1 checkpoint(s) in a row could not be written" in seen["error"]
        assert "start the same command again" in seen["error"]
        assert seen["left"] == ["step-1"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_place_may_be_named_by_a_url(ranks, outcomes, places):
    for seen in (rank["save_by_url"] for rank in outcomes[ranks]):
        assert seen["location"] == f"file://{places[ranks]}/save_by_url/step-3"
        assert seen["left"] == ["step-2", "step-3"]
        assert seen["same"]


def test_a_store_without_directories_and_renaming(job):
    location = f"memory://{uuid4()}"
    files = MemoryFileSystem()
    toy = ToyCheckpoints(location, job, keep=2)
    assert toy.checkpoints.latest() is None
    toy.save(1, best=Best("auc", 0.75))
    state = state_of(job)
    job.train(1)
    toy.save(2, 3)
    with files.open(f"{location}/step-4/__0_0.distcp", "wb") as stream:
        stream.write(b"of an attempt that was killed")
    toy.save(5)
    assert toy.steps() == [1, 3, 5]
    assert sorted(toy.checkpoints.store.directories()) == ["step-1", "step-3", "step-5"]
    flipped = bytearray(files.cat_file(f"{location}/step-5/__0_0.distcp"))
    flipped[100] ^= 1
    files.pipe_file(f"{location}/step-5/__0_0.distcp", bytes(flipped))
    assert toy.checkpoints.latest().step == 3
    toy.load(toy.checkpoints.best())
    assert_same_state(state_of(job), state)
    toy.checkpoints.clear()
    assert files.find(location) == []


def test_a_marker_that_cannot_be_written_leaves_no_checkpoint(job, tmp_path):
    toy = ToyCheckpoints(tmp_path, job)
    with mock.patch("hetegen_rec.training.checkpoint_store.write_whole", side_effect=OSError("no quota")):
        toy.save(1)
    assert names_in(tmp_path) == []
    toy.save(2)
    assert toy.steps() == [2]


def test_values_that_are_no_json_are_no_checkpoint(job, tmp_path):
    toy = ToyCheckpoints(tmp_path, job)
    toy.save(1, cursor=object())
    assert names_in(tmp_path) == []


def test_the_context_ends_with_the_last_write(job, tmp_path):
    toy, gate = ToyCheckpoints(tmp_path, job), Gate()
    with gate.closed(), toy.writer:
        toy.begin(1)
        gate.open_after(0.2)
    assert toy.steps() == [1]


def end_training_with_an_error(toy: ToyCheckpoints) -> None:
    with full_disk(), toy.writer:
        toy.begin(1)
        raise ZeroDivisionError


def test_an_error_of_training_is_not_replaced_by_one_of_the_writer(job, tmp_path):
    with pytest.raises(ZeroDivisionError):
        end_training_with_an_error(ToyCheckpoints(tmp_path, job))


@contextmanager
def small_file_system(directory: Path, size: str) -> Iterator[Path]:
    """A file system of its own in memory, of a few megabytes."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a file system of a few megabytes: {error}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a file system of a few megabytes")
def test_a_disk_that_is_really_full(runtime, tmp_path):
    job = Job(runtime, "table_wise", tables=TABLES | {"item": 20_000})  # 0.7 MB with its state
    with small_file_system(tmp_path / "small", "2m") as directory:
        toy = ToyCheckpoints(directory, job, keep=1)
        toy.save(1)
        (directory / "filler").write_bytes(bytes(1_000_000))
        with warnings_told("checkpoint_writer") as told:
            toy.save(2)
        (warning,) = told
        assert "No space left on device" in warning
        assert names_in(directory) == ["filler", "step-1"]
        assert toy.checkpoints.latest().step == 1
        (directory / "filler").unlink()
        toy.save(3)
        assert names_in(directory) == ["step-3"]
        assert toy.checkpoints.latest().step == 3
