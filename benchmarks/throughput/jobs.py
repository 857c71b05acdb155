"""Turns that are jobs of their own, for variants that differ in their number of ranks."""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.throughput.stopwatch import Turn

_SHOWN = 3_000  # characters of what a failed job wrote


def slowest_turn_of_jobs(variant: str, ranks: int, jobs: int, arguments: Sequence[str]) -> Turn:
    """Starts this program in some jobs at once on this host, for one turn of a variant.

    Args:
        variant: its name.
        ranks: processes of a job.
        jobs: how many, each on cores of its own.
        arguments: of the program, as it was started itself.

    Returns:
        The turn of the job with the longest steps.

    Raises:
        RuntimeError: a job failed.
    """
    with ThreadPoolExecutor(jobs) as pool:
        turns = pool.map(lambda job: _turn_of_job(variant, ranks, job * ranks, arguments), range(jobs))
        return max(turns, key=lambda turn: statistics.median(turn.seconds))


def _turn_of_job(variant: str, ranks: int, first_core: int, arguments: Sequence[str]) -> Turn:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        path = Path(directory) / "turn.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        program = ["--nproc-per-node", str(ranks), "-m", "benchmarks.run", *arguments]
        command = [*launcher, *program, "--turn", variant, str(first_core), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-_SHOWN:]}")
        return Turn.load(path)


def keep_to_cores(first: int, count: int) -> None:
    """Keeps this process to some of the cores that it may use, one for each rank of its job.

    So one rank is no faster because it has the cores of those that are not there. Where there are too few
    cores, they are shared.

    Args:
        first: by place among them.
        count: how many.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[place % len(cores)] for place in range(first, first + count)})
