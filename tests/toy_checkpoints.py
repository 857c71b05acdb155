"""Checkpoints of the toy model, for tests of what writes and reads them."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Timer
from typing import Any
from unittest import mock

import torch
from fsspec.implementations.local import LocalFileOpener
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer
from toy_model import Job

from hetegen_rec.distributed.optimizer_state import canonical_optimizer_state
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.training.checkpoint import CheckpointInfo, Checkpoints, complete_steps
from hetegen_rec.training.checkpoint_store import DigestingWriter
from hetegen_rec.training.checkpoint_writer import Best, CheckpointWriter


class ToyCheckpoints:
    """The checkpoints of a toy job in one place."""

    def __init__(
        self,
        location: str | Path,
        job: Job,
        *,
        keep: int = 2,
        failed_writes_allowed: int = 2,
        fingerprint: str = "toy",
    ) -> None:
        self.job = job
        self.checkpoints = Checkpoints(str(location), job.runtime, fingerprint)
        self.writer = CheckpointWriter(
            self.checkpoints, job.runtime, keep=keep, failed_writes_allowed=failed_writes_allowed
        )

    def begin(self, step: int, best: Best | None = None, **metadata: Any) -> None:
        """Begins to write a step's checkpoint."""
        self.writer.save(step, self.job.model, self.job.optimizer, metadata, best)

    def save(self, *steps: int, best: Best | None = None, **metadata: Any) -> None:
        """Writes checkpoints, and waits for each."""
        for step in steps:
            self.begin(step, best, **metadata)
            self.writer.wait()

    def load(self, info: CheckpointInfo | None = None) -> None:
        """Loads one into the job, the newest if none is named."""
        info = info or self.checkpoints.latest()
        assert info is not None
        self.checkpoints.load(info, self.job.model, self.job.optimizer)

    def steps(self) -> list[int]:
        """What was written to its end."""
        return complete_steps(self.checkpoints.store)


def state_of(job: Job) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a job, see `whole_state`."""
    return whole_state(job.model, job.optimizer, job.runtime)


def whole_state(
    model: DistributedModelParallel, optimizer: KeyedOptimizer, runtime: Runtime
) -> dict[str, torch.Tensor]:
    """Weights and optimizer state as whole tensors, put together from all ranks' shards. A collective."""
    found = {
        "weights": model.state_dict(),
        "state": canonical_optimizer_state(optimizer.state_dict())["state"],
    }
    parts = runtime.gather({path: _pieces(value) for path, value in _leaves(found)})
    return {
        path: _joined([piece for part in parts for piece in part.get(path, [])])
        for path in sorted({path for part in parts for path in part})
    }


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for key, part in value.items():
        yield from _leaves(part, f"{path} {key}".strip())


def _pieces(value: Any) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """This rank's parts of a tensor, each with its place in it."""
    if isinstance(value, ShardedTensor):
        shards = value.local_shards()
        return [(tuple(one.metadata.shard_offsets), one.tensor.detach().clone()) for one in shards]
    return [((0,) * value.ndim, value.detach().clone())]


def _joined(pieces: list[tuple[tuple[int, ...], torch.Tensor]]) -> torch.Tensor:
    size = [max(ends) for ends in zip(*[_ends(*piece) for piece in pieces], strict=True)]
    whole = torch.full(size, torch.nan)
    for place, values in pieces:
        whole[tuple(slice(*span) for span in zip(place, _ends(place, values), strict=True))] = values
    return whole


def _ends(place: tuple[int, ...], values: torch.Tensor) -> list[int]:
    return [start + length for start, length in zip(place, values.shape, strict=True)]


def assert_same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every tensor is there and has the same bits."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=0, msg=name)


@contextmanager
def full_disk(*, on_rank: bool = True, after_bytes: int = 1000) -> Iterator[None]:
    """Context in which shards find no room after so many bytes, on the ranks that are meant."""
    write, written = LocalFileOpener.write, 0

    def refusing(self: LocalFileOpener, block: Any, *others: Any) -> Any:
        nonlocal written
        written += memoryview(block).nbytes
        if on_rank and written > after_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.path)
        return write(self, block, *others)

    with mock.patch.object(LocalFileOpener, "write", refusing):
        yield


class Gate:
    """Holds up every writing of shards until it is opened."""

    def __init__(self) -> None:
        self._is_open = Event()
        self.events: list[str] = []
        """`begin` and `end` of every writing of this rank, in order."""

    def open(self) -> None:
        """Lets all writings go on, also the later ones."""
        self._is_open.set()

    def open_after(self, seconds: float) -> None:
        """Opens it from another thread, for who is about to wait for a writing."""
        Timer(seconds, self.open).start()

    @contextmanager
    def closed(self) -> Iterator["Gate"]:
        """Context in which it stands in the way; opened at its end."""
        write_data = DigestingWriter.write_data

        def waiting(writer: DigestingWriter, *arguments: Any) -> Any:
            self.events.append("begin")
            self._is_open.wait(timeout=30)
            result = write_data(writer, *arguments)
            self.events.append("end")
            return result

        with mock.patch.object(DigestingWriter, "write_data", waiting):
            try:
                yield self
            finally:
                self.open()


@contextmanager
def warnings_told(module: str) -> Iterator[list[str]]:
    """The warnings of one module of `hetegen_rec.training` on this rank."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(f"hetegen_rec.training.{module}")
    logger.addHandler(handler)
    try:
        yield told
    finally:
        logger.removeHandler(handler)
