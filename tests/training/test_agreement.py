"""What ranks agree on after a step, told by one and acted on by all."""

from typing import Any

import pytest
from multirank import run_ranks

from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.training.agreement import Agreement, Wishes


def test_any_wish_is_a_wish():
    assert not Wishes()
    assert Wishes(stop=True)
    assert Wishes(stop=True) | Wishes(save=True) == Wishes(stop=True, save=True)
    assert Wishes(report=True) | Wishes() == Wishes(report=True)


def tell(steps: int) -> dict[str, Any]:
    """The last rank wishes to stop in step 1 and to save in step 2; rank 0 to report in step 2."""
    seen: dict[str, Any] = {"shared": []}
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        agreement = Agreement(runtime)
        is_last = runtime.rank == runtime.world_size - 1
        for step in range(steps):
            mine = Wishes(
                stop=is_last and step == 1, save=is_last and step == 2, report=runtime.is_main and step == 2
            )
            seen["shared"].append(agreement.share(mine))
        seen["settled"] = agreement.settle()
        seen["settled twice"] = agreement.settle()
        agreement.share(Wishes(save=is_last))
        seen["reached"] = agreement.reach(Wishes(report=runtime.is_main))
        seen["left"] = agreement.settle()
        return seen


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    return [tell(3), *run_ranks(2, tell, 3)]


def test_what_any_rank_told_is_known_to_all_one_step_later(seen):
    for one in seen:
        assert one["shared"] == [Wishes(), Wishes(), Wishes(stop=True)]


def test_what_was_told_last_is_waited_for_and_returned_once(seen):
    for one in seen:
        assert one["settled"] == Wishes(save=True, report=True)
        assert one["settled twice"] == Wishes()


def test_reaching_waits_for_this_step_and_the_one_before(seen):
    for one in seen:
        assert one["reached"] == Wishes(save=True, report=True)
        assert one["left"] == Wishes()
