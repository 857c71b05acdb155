"""A directory that several ranks write appears whole or not at all."""

from pathlib import Path

import pytest
from raw_log import Threads, World

from hetegen_rec.data.workers import staged


def write(final: Path, workers: Threads, *, failing_rank: int | None = None) -> None:
    with staged(final, workers) as partial, workers.together("writing"):
        (partial / f"of {workers.rank}").touch()
        if workers.rank == failing_rank:
            raise OSError("disk full")


def left(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


def test_what_all_ranks_wrote_takes_the_place_of_an_earlier_directory(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").touch()
    assert World(2).run(lambda workers: write(tmp_path / "final", workers)) == [None, None]
    assert left(tmp_path) == {"final", "final/of 0", "final/of 1"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_of_any_rank_leaves_what_was_there(tmp_path: Path, rank: int) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").touch()
    errors = World(2).run(lambda workers: write(tmp_path / "final", workers, failing_rank=rank))
    assert [type(error) for error in errors] == [OSError if one == rank else RuntimeError for one in (0, 1)]
    assert left(tmp_path) == {"final", "final/old"}
