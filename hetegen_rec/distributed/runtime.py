"""The processes of one job: who this one is, which device it uses, and how all of them agree.

The only module that reads `os.environ` and the only one that chooses the device.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from hetegen_rec.config.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Gloo's threads outlive the group while a model refers to it, and abort the process if they let go of
# the last collective's tensors after the interpreter began to end (pytorch/pytorch#179291).
_SETTLE_SECONDS = 0.1

_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class DistributedError(RuntimeError):
    """Another rank failed, or the launcher's environment is incomplete."""


@dataclass(frozen=True)
class Runtime:
    """One process of the job, as seen by itself. Implements `hetegen_rec.data.workers.Workers`.

    Collectives must be called by all ranks, in the same order.
    """

    rank: int
    """Index of this process, from 0."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """Index of this process on its host."""
    local_world_size: int
    """Number of processes on this host."""
    device: torch.device
    """Where the model runs; tensors of the default process group live here."""
    host_group: dist.ProcessGroup
    """Gloo group for Python objects and CPU tensors. On CPU it is the default group."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which speaks and writes for all."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order of rank, on every rank. A collective."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank. A collective."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.host_group)
        return values[0]

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Context in which a failure of any rank is raised on every rank. A collective at its end.

        The failing rank raises its own exception. It must fail outside any collective of the block, or
        the others wait in that one until the job's time limit.

        Args:
            what: the work, for the message on the other ranks, such as "writing the encoded shards".

        Raises:
            DistributedError: on the ranks that did not fail, naming the first that did.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        reports = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, report in enumerate(reports):
            if report is not None:
                raise DistributedError(f"{what} failed on rank {rank}: {report}")


@contextmanager
def start_runtime(
    device: Literal["auto", "cpu", "cuda"] = "auto", timeout_seconds: int = 600
) -> Iterator[Runtime]:
    """Joins the job that a launcher started, or makes a job of one process where there is none.

    Args:
        device: `auto` takes CUDA where there is one.
        timeout_seconds: a collective that takes longer ends the job.

    Yields:
        This process's view of the job. The process groups end with the context.

    Raises:
        ConfigError: the device is not there.
        DistributedError: the launcher left part of its environment unset, or a group is running.
    """
    if dist.is_initialized():
        raise DistributedError("a process group is running already; start one runtime a process")
    place = _read_place()
    chosen = _choose_device(device, place["LOCAL_RANK"])
    _share_cores(place["LOCAL_WORLD_SIZE"])
    timeout = timedelta(seconds=timeout_seconds)
    _join(place, "nccl" if chosen.type == "cuda" else "gloo", timeout)
    try:
        yield Runtime(
            rank=place["RANK"],
            world_size=place["WORLD_SIZE"],
            local_rank=place["LOCAL_RANK"],
            local_world_size=place["LOCAL_WORLD_SIZE"],
            device=chosen,
            host_group=_host_group(chosen, timeout),
        )
    finally:
        dist.destroy_process_group()
        time.sleep(_SETTLE_SECONDS)


def _read_place() -> dict[str, int]:
    """This process's place in the job, from the launcher's variables; alone without a launcher."""
    names = _LAUNCHER_VARIABLES[:4]
    if "RANK" not in os.environ:
        return dict(zip(names, (0, 1, 0, 1), strict=True))
    missing = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
    if missing:
        raise DistributedError(
            f"RANK is set but {', '.join(missing)} not: start through torchrun or torchx, or unset RANK "
            "to run one process"
        )
    return {name: int(os.environ[name]) for name in names}


def _choose_device(wanted: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError(
            "distributed.device: cuda, but this PyTorch sees no CUDA device; set it to `auto` or `cpu`, or "
            "install the CUDA requirements and a driver"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"distributed.device: {wanted}, but local rank {local_rank} has no CUDA device: this host has "
            f"{count}; start at most {count} processes on it"
        )
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    return chosen


def _share_cores(local_world_size: int) -> None:
    """Gives each process of the host its share of the cores, so that they do not fight for them."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // local_world_size))


def _join(place: dict[str, int], backend: str, timeout: timedelta) -> None:
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:  # A store inside the process needs no port, so any number of lone jobs share a machine.
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    logger.info("rank %d of %d joined through %s", place["RANK"], place["WORLD_SIZE"], backend)


def _host_group(device: torch.device, timeout: timedelta) -> dist.ProcessGroup:
    if device.type == "cuda":
        return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
    return cast(dist.ProcessGroup, dist.group.WORLD)
