"""The processes of one job: who this one is, which device it uses, and how all of them agree.

The only module that reads `os.environ` and the only one that chooses the device.
"""

import logging
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.distributed.heaps import set_up_malloc
from hetegen_rec.distributed.meeting import MeetingError, meet

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Gloo's threads outlive the group while a model refers to it, and abort the process if they let go of
# the last collective's tensors after the interpreter began to end (pytorch/pytorch#179291).
_SETTLE_SECONDS = 0.1

_STORE_SECONDS = 5.0  # for an answer of the job's store, where a failed rank asks

# The watchdog of a hung rank must run out before the others' collectives do, and tell its stacks.
_WATCHDOG_FIRST = timedelta(seconds=60)

# What NCCL says where another rank is gone; the same class tells of its own failures.
_LOST_TO_NCCL = ("ncclRemoteError", "ncclSystemError", "remote process exited", "communicator was aborted")

_LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

# Else larger pinned buffers are rounded up to powers of two: copies for checkpoints to twice their size. Most
# tensors of batches are smaller, and their buffers are used again. Both limits must be the same power of two:
# PyTorch 2.13 gives a freed buffer to any request that rounds up to the same power, so that what does not fit
# an unrounded one would be written beyond its end (pytorch/pytorch#192722).
_PINNED_SIZES = "pinned_max_round_threshold_mb:64,pinned_max_cached_size_mb:64"
_ALLOCATOR_VARIABLES = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)  # where somebody has set it otherwise

_NO_NAME = "none"  # what torchrun calls a job that was given no name

# Keys in the job's store.
_BACKEND = "hetegen_rec/backend"  # of rank 0
_FAILURE = "hetegen_rec/failure"  # ranks that told of a failure


class DistributedError(RuntimeError):
    """The job cannot start or go on. The message says why."""


class PeerFailedError(DistributedError):
    """Another rank failed and tells of it itself; this one only stops."""


class LostPeerError(DistributedError):
    """Another rank went without a word, or cannot be reached. A new attempt may do."""


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
    job_id: str
    """Name of the job, also after restarts and after hosts came or went. Another job has another."""
    restart_count: int
    """How often ranks were started again because one failed. Hosts that come or go do not count."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which speaks and writes for all."""
        return self.rank == 0

    @property
    def ends_with_others(self) -> bool:
        """Whether the process groups end on all ranks together, once all collectives are done.

        So it is with NCCL, and a failed rank would wait for ever: what it owes to others' collectives never
        comes. Groups of gloo end alone.
        """
        return self.device.type == "cuda" and self.world_size > 1

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
            PeerFailedError: on the ranks that did not fail, naming the first that did.
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
                raise PeerFailedError(f"{what} failed on rank {rank}: {report}")

    def leave(self, code: int) -> None:
        """Ends this process at once, if to end in order would be to wait for ranks that wait for this one.

        See `ends_with_others`; where it does not, the call returns.

        Args:
            code: exit code.
        """
        if self.ends_with_others:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def is_first_to_fail(self) -> bool:
        """Notes in the job's store that this rank failed; returns whether no other did before.

        No collective: the others may be anywhere. So of many ranks that meet one problem, one tells. A rank
        that cannot reach the store tells too.
        """
        earlier: list[int] = []

        def ask() -> None:
            with suppress(RuntimeError):  # the store went with the process that held it
                earlier.append(int(dist.distributed_c10d._get_default_store().add(_FAILURE, 1)) - 1)

        # Where the network is cut, the question has no end.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(_STORE_SECONDS)
        return not any(earlier)


@contextmanager
def start_runtime(
    device: Literal["auto", "cpu", "cuda"] = "auto", timeout_seconds: int = 600
) -> Iterator[Runtime]:
    """Joins the job that a launcher started, or makes a job of one process where there is none.

    Args:
        device: `auto` takes CUDA where there is one.
        timeout_seconds: a collective that takes a minute longer fails. The minute is for watchdogs, which
            tell more than a broken collective.

    Yields:
        This process's view of the job. The process groups end with the context.

    Raises:
        ConfigError: the device is not there, or ranks have devices of different kinds.
        DistributedError: the launcher left part of its environment unset, or a group is running.
        LostPeerError: not all ranks came in time.
    """
    if dist.is_initialized():
        raise DistributedError("a process group is running already; start one runtime a process")
    place = _read_place()
    chosen = _choose_device(device, place["LOCAL_RANK"], place["LOCAL_WORLD_SIZE"])
    _share_cores(place["LOCAL_WORLD_SIZE"])
    set_up_malloc(os.environ)
    timeout = timedelta(seconds=timeout_seconds) + _WATCHDOG_FIRST
    _limit_later_groups(timeout)
    _join(place, "nccl" if chosen.type == "cuda" else "gloo", timeout)
    try:
        with _coming_together():
            host_group = _host_group(chosen, timeout)
            job_id, restart_count = _agree_on_job(host_group, place["WORLD_SIZE"])
        yield Runtime(
            rank=place["RANK"],
            world_size=place["WORLD_SIZE"],
            local_rank=place["LOCAL_RANK"],
            local_world_size=place["LOCAL_WORLD_SIZE"],
            device=chosen,
            host_group=host_group,
            job_id=job_id,
            restart_count=restart_count,
        )
    finally:
        dist.destroy_process_group()
        time.sleep(_SETTLE_SECONDS)


def describe_loss(error: Exception) -> str | None:
    """What an error says, if it says that another rank is gone or cannot be reached; else None."""
    text = str(error).partition("\n")[0]
    if isinstance(error, MeetingError | dist.DistNetworkError | dist.DistStoreError):
        return text
    if isinstance(error, dist.DistBackendError) and any(word in str(error) for word in _LOST_TO_NCCL):
        return text
    if "gloo/transport" not in text:  # gloo has no error class of its own, but tells its source file
        return None
    return re.sub(r"^.*\[\S*gloo/transport\S*\] ", "", text).partition(". This is typically")[0]


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process as one of a job."""
    return "RANK" in os.environ


def leads_host() -> bool:
    """Whether this is the first process of the job on its host, also before the job has met."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def seconds_to_stop() -> int:
    """How long a launcher waits for a rank that it asked to stop, before it kills it; torchrun's setting."""
    return int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


def environment_of_rank(
    rank: int, world_size: int, port: int, job_id: str, restart_count: int, local_size: int | None = None
) -> dict[str, str]:
    """The environment from which a rank of a job on this host reads its place, as torchrun sets it.

    Args:
        rank: index of the process.
        world_size: processes of the job.
        port: of the launcher's key-value store, which outlives the ranks.
        job_id: name of the job.
        restart_count: how often ranks were started before.
        local_size: of these hosts, all of which are this one, the ranks of each; default: one host.
    """
    local_size = local_size or world_size
    of_rank = (rank, world_size, rank % local_size, local_size, "localhost", port)
    place = dict(zip(_LAUNCHER_VARIABLES, of_rank, strict=True))
    return {
        **os.environ,
        **{name: str(value) for name, value in place.items()},
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": job_id,
        "TORCHELASTIC_RESTART_COUNT": str(restart_count),
    }


def take_environment(environment: dict[str, str]) -> None:
    """Gives this process an environment in the place of its own, before it starts its runtime."""
    os.environ.clear()
    os.environ.update(environment)


def _read_place() -> dict[str, int]:
    """This process's place in the job, from the launcher's variables; alone without a launcher."""
    names = _LAUNCHER_VARIABLES[:4]
    if not is_launched():
        return dict(zip(names, (0, 1, 0, 1), strict=True))
    missing = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
    if missing:
        raise DistributedError(
            f"RANK is set but {', '.join(missing)} not: start through torchrun or torchx, or unset RANK "
            "to run one process"
        )
    return {name: int(os.environ[name]) for name in names}


def _choose_device(
    wanted: Literal["auto", "cpu", "cuda"], local_rank: int, local_world_size: int
) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError(
            "distributed.device: cuda, but this PyTorch sees no CUDA device; set it to `auto` or `cpu`, or "
            "install the CUDA requirements and a driver"
        )
    count = torch.cuda.device_count()
    if local_world_size > count:
        raise ConfigError(
            f"distributed.device: {wanted}, but {local_world_size} processes share the {count} CUDA "
            f"device(s) of this host; start at most {count} on it"
        )
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        torch._C._accelerator_setAllocatorSettings(_PINNED_SIZES)
    return chosen


def _share_cores(local_world_size: int) -> None:
    """Gives each process of the host its share of the cores, so that they do not fight for them."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // local_world_size))


def _limit_later_groups(timeout: timedelta) -> None:
    """Gives groups that others make the same time: TorchRec makes those of hosts without telling any."""
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]


def _join(place: dict[str, int], backend: str, timeout: timedelta) -> None:
    if is_launched():
        _join_launched(backend, timeout)
    else:  # A store inside the process needs no port, so any number of lone jobs share a machine.
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    logger.info("rank %d of %d joined through %s", place["RANK"], place["WORLD_SIZE"], backend)


def _join_launched(backend: str, timeout: timedelta) -> None:
    """Joins the ranks that were started together with this one, and no dead ones."""
    with _coming_together():
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        name = meet(store, rank, world_size, timeout)
        store = PrefixStore(name, store)
        _require_backend_of_rank_0(store, rank, backend)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _require_backend_of_rank_0(store: Store, rank: int, backend: str) -> None:
    """Refuses ranks whose `device: auto` chose otherwise than rank 0's: they would wait for each other."""
    if rank == 0:
        store.set(_BACKEND, backend)
    expected = store.get(_BACKEND).decode()
    if backend != expected:
        raise ConfigError(
            f"distributed.device: rank {rank} on {socket.gethostname()} would join through {backend}, but "
            f"rank 0 through {expected}; see why not all hosts have CUDA devices that can be used, or set it "
            "to `cpu`"
        )


@contextmanager
def _coming_together() -> Iterator[None]:
    """Context in which another rank's absence is told as such."""
    try:
        yield
    except RuntimeError as error:
        loss = describe_loss(error)
        if loss is None:
            raise
        raise LostPeerError(f"the ranks of the job did not come together: {loss}") from error


def _agree_on_job(host_group: dist.ProcessGroup, world_size: int) -> tuple[str, int]:
    """Rank 0's name of the job and the highest count of restarts, as every host counts its own."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", _NO_NAME)
    restart_count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    mine = (uuid.uuid4().hex if name == _NO_NAME else name, restart_count)
    told: list[Any] = [None] * world_size
    dist.all_gather_object(told, mine, group=host_group)
    return told[0][0], max(count for _, count in told)


def _host_group(device: torch.device, timeout: timedelta) -> dist.ProcessGroup:
    if device.type == "cuda":
        return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))
    return cast(dist.ProcessGroup, dist.group.WORLD)
