"""Tables on huge pages, where the system has them."""

import platform
import re
from pathlib import Path

import pytest
import torch
from multirank import run_ranks
from toy_model import Job

from hetegen_rec.distributed.huge_pages import use_huge_pages
from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.distributed.sharding import local_parts, move_tables_to_huge_pages, table_weights

_MIB = 1 << 20
_RELEASE = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])


def _on_huge_pages(tensor: torch.Tensor) -> int:
    """Bytes of the mapping that holds a tensor's middle which lie on huge pages."""
    middle = tensor.data_ptr() + tensor.nbytes // 2
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(bounds[1], 16) <= middle < int(bounds[2], 16)
        elif is_there and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"no mapping holds {middle:#x}")


needs_huge_pages = pytest.mark.skipif(
    _RELEASE < (6, 1) or not Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").exists(),
    reason="this system does not move memory to huge pages when asked",
)


def _moved() -> tuple[int, bool]:
    """Bytes that lie on huge pages only after a tensor of 64 MiB was moved, and whether it holds the same."""
    tensor = torch.arange(8 * _MIB)  # touched on ordinary pages
    before = _on_huge_pages(tensor)
    use_huge_pages(tensor)
    return _on_huge_pages(tensor) - before, torch.equal(tensor, torch.arange(8 * _MIB))


@needs_huge_pages
def test_what_a_tensor_holds_moves_to_huge_pages_and_stays() -> None:
    ((moved, is_equal),) = run_ranks(1, _moved)  # in a process without earlier tensors beside it
    assert moved > 32 * _MIB
    assert is_equal


def test_tensors_below_a_page_are_left_alone() -> None:
    tensor = torch.arange(1000)
    use_huge_pages(tensor)
    use_huge_pages(torch.empty(0))
    assert torch.equal(tensor, torch.arange(1000))


def _moved_tables(sharding: str) -> tuple[list[float], list[float], list[int]]:
    """Scores before and after tables were moved, and their bytes on huge pages."""
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        job = Job(runtime, sharding, tables={"user": 1_200_000, "tiny": 2})
        job.train(1)
        before = job.scores()
        move_tables_to_huge_pages(job.model)
        parts = local_parts(table_weights(job.model)["user"])
        return before, job.scores(), [_on_huge_pages(part) for part in parts]


@needs_huge_pages
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "data_parallel"])
def test_tables_lie_on_huge_pages_wherever_they_are_sharded_to(sharding: str) -> None:
    found = run_ranks(2, _moved_tables, sharding)
    for before, after, _ in found:
        assert before == after
    on_huge_pages = [size for _, _, sizes in found for size in sizes]
    assert len(on_huge_pages) == (1 if sharding == "table_wise" else 2)
    assert all(size >= 8 * _MIB for size in on_huge_pages)
