import os
import signal
from typing import Any

import pytest

from hetegen_rec.config.plan import World
from hetegen_rec.distributed.local_ranks import run_on_local_ranks
from hetegen_rec.distributed.runtime import DistributedError, start_runtime

FOUR = World(num_hosts=2, local_size=2)


def _tell_place(word: str) -> Any:
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        return runtime.gather((word, runtime.rank, runtime.local_rank, runtime.local_world_size))


def _fail(how: str) -> None:
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        if runtime.rank == 2 and how == "by an error":
            raise ValueError("no such row")
        if runtime.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        runtime.gather("the others wait here")


def test_ranks_know_their_places_on_hosts() -> None:
    places = [("here", rank, rank % 2, 2) for rank in range(4)]
    assert run_on_local_ranks(FOUR, _tell_place, "here") == [places] * 4


@pytest.mark.parametrize(
    ("how", "told"), [("by an error", "ValueError: no such row"), ("killed", "it ended without a word")]
)
def test_the_rank_that_failed_is_named(how: str, told: str) -> None:
    with pytest.raises(DistributedError, match=f"rank 2 of 4 failed: {told}"):
        run_on_local_ranks(FOUR, _fail, how)
