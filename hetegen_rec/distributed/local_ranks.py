"""Ranks on this machine for a function's sake: forks of one process that has imported what they need.

Importing torch and torchrec takes longer than the work, so `multiprocessing`'s fork server does it once.
Forking is safe because that process has no process group and does nothing but import and fork.
"""

import multiprocessing
import traceback
import uuid
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any, TypeVar

from torch._C._distributed_c10d import TCPStore

from hetegen_rec.config.plan import World
from hetegen_rec.distributed.runtime import (
    DistributedError,
    describe_loss,
    environment_of_rank,
    take_environment,
)
from hetegen_rec.terminal import quiet_libraries

T = TypeVar("T")

# The first optimizer of a process imports torch._dynamo.
_IMPORTED = ("torch._dynamo",)
_FOLLOW_SECONDS = 5.0  # for the rank that is to blame to tell, where another fell over its absence


def run_on_local_ranks(world: World, work: Callable[..., T], *arguments: Any) -> list[T]:
    """Calls a function on every rank of a new job of this machine; returns its results by rank.

    Hosts are only told apart by what the ranks are told of their places.

    Args:
        world: the ranks.
        work: a function that can be imported. It starts the runtime itself.
        arguments: of the function; pickled, as its results are.

    Raises:
        DistributedError: a rank failed. All are gone then.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED, work.__module__])
    job_id, processes = uuid.uuid4().hex, []
    ranks: dict[Any, int] = {}
    try:
        for rank in range(world.size):
            told, tell = context.Pipe(duplex=False)
            place = environment_of_rank(rank, world.size, store.port, job_id, 0, world.local_size)
            process = context.Process(target=_be_rank, args=(place, tell, work, arguments), daemon=True)
            process.start()
            processes.append(process)
            tell.close()
            ranks[told] = rank
        results = _collect(ranks)
        for process in processes:
            process.join(_FOLLOW_SECONDS)
        return [results[rank] for rank in range(world.size)]
    finally:
        for process in processes:
            process.kill()


def _be_rank(
    environment: dict[str, str], tell: Any, work: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    """What a rank does, from its first moment on."""
    take_environment(environment)
    quiet_libraries()
    try:
        tell.send(("done", work(*arguments)))
    except Exception as error:
        blame = "lost" if describe_loss(error) else "failed"
        tell.send((blame, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def _receive(told: Any) -> tuple[str, Any]:
    """What a rank told, or that it did not."""
    try:
        kind, value = told.recv()
    except (EOFError, ConnectionError):
        return "failed", "it ended without a word; it may have been killed for memory"
    return kind, value


def _collect(ranks: dict[Any, int]) -> dict[int, Any]:
    """Waits for all ranks, or for the first that fails and a little longer."""
    waiting = dict(ranks)
    results: dict[int, Any] = {}
    problems: list[tuple[bool, int, str]] = []
    while waiting:
        ready = connection.wait(list(waiting), _FOLLOW_SECONDS if problems else None)
        if not ready:
            break
        for told in ready:
            rank = waiting.pop(told)
            kind, value = _receive(told)
            if kind == "done":
                results[rank] = value
            else:
                problems.append((kind == "lost", rank, value))
    if problems:
        _, rank, text = min(problems)
        raise DistributedError(f"rank {rank} of {len(ranks)} failed: {text.rstrip()}")
    return results
