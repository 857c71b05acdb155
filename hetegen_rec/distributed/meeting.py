"""Telling the ranks that were started together from those of an earlier attempt.

torchrun keeps one key-value store over restarts and PyTorch puts no prefix of the attempt before its keys
(pytorch/pytorch#135712). A rank that is a few seconds earlier than the others then finds addresses of dead
processes under the right keys, and the restart fails. Restart counts cannot be the prefix, because every
host counts its own. So the ranks agree on a name of their own before anything else is put there.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store

_PREFIX = "hetegen_rec/meeting"
_POLL_SECONDS = 0.02


class MeetingError(RuntimeError):
    """Not all ranks came in time. The message says which."""


def meet(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Agrees on a name for this attempt, which no earlier one had. All ranks must call it.

    Each rank asks under a word that it has just made up, and rank 0 answers whatever was asked, until every
    rank has confirmed its answer. What dead ranks asked or answered, no living one looks at.

    Args:
        store: may hold anything that earlier attempts put there.
        rank: this process.
        world_size: processes that were started together.
        timeout: how long to wait for the others.

    Raises:
        MeetingError: not all ranks came in time.
    """
    if rank == 0:
        return _gather(store, world_size, timeout)
    question = uuid.uuid4().hex
    store.set(f"{_PREFIX}/question/{rank}", question)
    answer = f"{_PREFIX}/answer/{question}"
    try:
        store.wait([answer], timeout)
    except dist.DistStoreError as error:
        raise MeetingError(
            f"rank 0 did not answer rank {rank} within {timeout.total_seconds():g} s; see why rank 0 did not "
            "start, or whether its host can be reached"
        ) from error
    name = store.get(answer).decode()
    store.set(f"{_PREFIX}/{name}/{rank}", "here")
    return name


def _gather(store: Store, world_size: int, timeout: timedelta) -> str:
    name = uuid.uuid4().hex
    deadline = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for rank in missing:
            if store.check([f"{_PREFIX}/question/{rank}"]):
                question = store.get(f"{_PREFIX}/question/{rank}").decode()
                store.set(f"{_PREFIX}/answer/{question}", name)
        missing = {rank for rank in missing if not store.check([f"{_PREFIX}/{name}/{rank}"])}
        if missing and time.monotonic() > deadline:
            seconds = f"{timeout.total_seconds():g} s"
            raise MeetingError(
                f"{world_size - len(missing)} of {world_size} ranks came within {seconds}; see why these did "
                f"not start: {', '.join(map(str, sorted(missing)))}"
            )
        time.sleep(_POLL_SECONDS)
    return name
