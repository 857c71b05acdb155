"""Ranks that start together agree on a name, whatever earlier attempts left in the store."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from hetegen_rec.distributed.meeting import MeetingError, meet

TIMEOUT = timedelta(seconds=20)


def attempt(store: dist.Store, world_size: int, late: int | None = None) -> set[str]:
    """The names that the ranks of one attempt end up with."""

    def join(rank: int) -> str:
        time.sleep(0.3 * (rank == late))
        return meet(store, rank, world_size, TIMEOUT)

    with ThreadPoolExecutor(world_size) as ranks:
        return set(ranks.map(join, range(world_size)))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_every_attempt_has_a_name_of_its_own_whoever_comes_late(late):
    store = HashStore()
    names = [attempt(store, world_size, late) for world_size in (3, 3, 2, 4)]
    assert all(len(name) == 1 for name in names)
    assert len(set.union(*names)) == 4


def test_one_rank_meets_nobody():
    assert attempt(HashStore(), 1)


def test_an_attempt_that_broke_off_leaves_nothing_that_matters():
    store = HashStore()
    with pytest.raises(MeetingError):
        meet(store, 1, 3, timedelta(seconds=0.1))
    with pytest.raises(MeetingError):
        meet(store, 0, 3, timedelta(seconds=0.1))
    assert len(attempt(store, 3, late=1)) == 1


def test_who_is_missing_is_named():
    with pytest.raises(MeetingError, match=r"1 of 3 ranks came within 0\.1 s.*: 1, 2"):
        meet(HashStore(), 0, 3, timedelta(seconds=0.1))
    with pytest.raises(MeetingError, match=r"rank 0 did not answer rank 2 within 0\.1 s"):
        meet(HashStore(), 2, 3, timedelta(seconds=0.1))
