"""Writing checkpoints while training goes on.

Training waits while its state is copied to host memory. A thread writes the copy, on a process group of
its own, so that its collectives never mix with those of the steps.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from threading import Thread
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from hetegen_rec.distributed.optimizer_state import canonical_optimizer_state
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.distributed.sharding import global_shape, tables_in
from hetegen_rec.sealing import sealed, unsealed
from hetegen_rec.training.checkpoint import (
    FORMAT_VERSION,
    METADATA,
    CheckpointError,
    Checkpoints,
    best_step,
    causes,
    complete_steps,
    shapes_over_ranks,
    step_name,
    written_steps,
)
from hetegen_rec.training.staging import HostCopies

logger = logging.getLogger(__name__)

_WRITING_LIMIT = timedelta(hours=2)
"""A rank may write this much longer than the others before the write counts as failed."""

_SECONDS_AFTER_ERROR = 10.0


@dataclass(frozen=True)
class Best:
    """Why a checkpoint is the best so far."""

    metric: str
    value: float


class CheckpointWriter:
    """Writes the checkpoints of one stage, one at a time, and removes those that are no longer kept.

    All public methods are collectives. A write that fails leaves no checkpoint; the ones before stay. It is
    told of by a warning, and by an error if too many fail in a row or if it was the last one of the stage.
    """

    def __init__(
        self, checkpoints: Checkpoints, runtime: Runtime, *, keep: int, failed_writes_allowed: int
    ) -> None:
        """Makes the process group of the writing threads.

        Args:
            checkpoints: where to write.
            runtime: this process's view of the job.
            keep: newest checkpoints that stay, besides the best.
            failed_writes_allowed: writes in a row that may fail.
        """
        self._store = checkpoints.store
        self._fingerprint, self._identities = checkpoints.fingerprint, checkpoints.identities
        group = dist.new_group(backend="gloo", timeout=_WRITING_LIMIT)
        self._background = replace(runtime, host_group=group)
        self._keep = keep
        self._failed_writes_allowed = failed_writes_allowed
        self._copies = HostCopies()
        self._thread: Thread | None = None
        self._failure: Exception | None = None
        self._failed_in_a_row = 0

    def reserve(self, model: DistributedModelParallel, optimizer: KeyedOptimizer) -> None:
        """Makes the buffers of the copies, so that a host without the memory fails before the first step."""
        self._copy(model, optimizer)

    def save(
        self,
        step: int,
        model: DistributedModelParallel,
        optimizer: KeyedOptimizer,
        metadata: Mapping[str, Any],
        best: Best | None = None,
    ) -> None:
        """Copies the state and returns; the checkpoint `step-N` appears later, whole or not at all.

        Waits for the write before, if it is still going on.

        Args:
            step: steps taken; a checkpoint of the same step is replaced.
            model: the sharded model.
            optimizer: from `make_optimizer`.
            metadata: JSON values to keep beside it: stage, progress, metrics, plan.
            best: marks it as the best so far, which protects it from removal.

        Raises:
            CheckpointError: too many writes failed in a row.
        """
        self.wait()
        state = self._copy(model, optimizer)
        self._thread = Thread(
            target=self._write_or_fail,
            args=(step, state, dict(metadata), best),
            name="hetegen-checkpoint",
            daemon=True,  # a process that fails elsewhere must not wait for a collective of it
        )
        self._thread.start()

    def relabel(self, step: int, metadata: Mapping[str, Any], best: Best | None = None) -> None:
        """Renews what the checkpoint of a step says, where nothing was trained since it was loaded.

        It is complete at any moment, which it would not be if it were written again.
        """
        self.wait()
        name = f"{step_name(step)}/{METADATA}"
        with self._background.together(f"renewing {self._store.path(name)}"):
            if self._background.is_main:
                description = unsealed(self._store.read_text(name))
                renewed = {"metadata": dict(metadata), "best": None if best is None else asdict(best)}
                self._store.write_text(name, sealed({**description, **renewed}))

    def wait(self) -> None:
        """Waits until the checkpoint under way is written or has failed.

        Raises:
            CheckpointError: too many writes failed in a row.
        """
        self._join()
        if self._failure is not None and self._failed_in_a_row > self._failed_writes_allowed:
            self.finish()
        self._failure = None

    def finish(self) -> None:
        """Waits for the last checkpoint of a stage.

        Raises:
            CheckpointError: it could not be written.
        """
        self._join()
        if self._failure is not None:
            raise CheckpointError(
                f"{self._store.location}: {self._failed_in_a_row} checkpoint(s) in a row could not be "
                f"written, the last because of: {self._failure}. Training stops; the checkpoints before are "
                "intact. Make room or mend the storage, and start the same command again"
            ) from self._failure

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Waits for the last checkpoint; where training ends with an error anyway, not for long."""
        if error is None:
            self.finish()
            dist.destroy_process_group(self._background.host_group)
        elif self._thread is not None:
            self._thread.join(_SECONDS_AFTER_ERROR)

    def _copy(self, model: DistributedModelParallel, optimizer: KeyedOptimizer) -> dict[str, Any]:
        optimizer_state = canonical_optimizer_state(optimizer.state_dict())
        return self._copies.take({"model": model.state_dict(), "optimizer": optimizer_state})

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write_or_fail(
        self, step: int, state: dict[str, Any], metadata: dict[str, Any], best: Best | None
    ) -> None:
        try:
            self._write(step, state, metadata, best)
            self._failed_in_a_row = 0
        except Exception as error:  # told to the training thread, which decides
            self._failure = error
            self._failed_in_a_row += 1
            if self._background.is_main:
                logger.warning(
                    "checkpoint %s could not be written, training goes on: %s",
                    self._store.path(step_name(step)),
                    error,
                )
                self._remove_torn(step_name(step))

    def _write(self, step: int, state: dict[str, Any], metadata: dict[str, Any], best: Best | None) -> None:
        name, ranks = step_name(step), self._background
        with ranks.together(f"making {self._store.path(name)}"):
            if ranks.is_main:
                self._store.remove_file(f"{name}/{METADATA}")
                self._store.remove_directory(name)
                self._store.make(name)
        writer = self._store.writer(name)
        try:
            save_shards(state, storage_writer=writer, process_group=ranks.host_group)
        except CheckpointException as error:
            raise CheckpointError(causes(error)) from error
        description = {
            "format": FORMAT_VERSION,
            "step": step,
            "fingerprint": self._fingerprint,
            "world_size": ranks.world_size,
            "tables": {name: list(global_shape(value)) for name, value in tables_in(state["model"]).items()},
            "identities": {table: identity.as_json() for table, identity in self._identities.items()},
            "optimizer_state": shapes_over_ranks(state["optimizer"], ranks),
            "best": None if best is None else asdict(best),
            "files": {file: about for part in ranks.gather(writer.files) for file, about in part.items()},
            "metadata": metadata,
        }
        with ranks.together(f"finishing {self._store.path(name)}"):
            if ranks.is_main:
                self._store.write_text(f"{name}/{METADATA}", sealed(description))
        if ranks.is_main:
            self._prune(step)

    def _prune(self, newest: int) -> None:
        """Removes what is no longer kept, and what was begun only. What fails is tried again next time."""
        try:
            complete = complete_steps(self._store)
            kept = {*complete[-self._keep :], best_step(self._store), newest}
            old = [step for step in written_steps(self._store) if step not in kept]
        except Exception as error:  # stores have errors of their own
            logger.warning(
                "%s could not be listed to remove old checkpoints: %s", self._store.location, error
            )
            return
        for step in old:
            self._remove(step_name(step))

    def _remove_torn(self, name: str) -> None:
        """Removes what a failed write left, unless the checkpoint was complete before another rank failed."""
        try:
            is_complete = self._store.exists(f"{name}/{METADATA}")
        except Exception as error:  # stores have errors of their own
            logger.warning("%s: cannot tell whether it is complete: %s", self._store.path(name), error)
            return
        if not is_complete:
            self._remove(name)

    def _remove(self, name: str) -> None:
        try:
            self._store.remove_file(f"{name}/{METADATA}")  # first, so that no complete one lacks a file
            self._store.remove_directory(name)
        except Exception as error:
            logger.warning("%s could not be removed, to be tried again: %s", self._store.path(name), error)
