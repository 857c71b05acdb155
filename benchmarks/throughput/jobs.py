"""Turns that are jobs of their own, for variants that differ in their number of ranks."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.throughput.stopwatch import Turn

_SHOWN = 3_000  # characters of what a failed job wrote


def turn_of_job(variant: str, ranks: int, arguments: Sequence[str]) -> Turn:
    """Starts this program on so many ranks of this host, for one turn of a variant.

    Args:
        variant: its name.
        ranks: processes of the job.
        arguments: of the program, as it was started itself.

    Raises:
        RuntimeError: the job failed.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        path = Path(directory) / "turn.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        program = ["--nproc-per-node", str(ranks), "-m", "benchmarks.run", *arguments]
        command = [*launcher, *program, "--turn", variant, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-_SHOWN:]}")
        return Turn.load(path)


def share_first_cores(count: int) -> None:
    """Keeps this process to the first cores that it may use, one for each rank of its job.

    So one rank is no faster because it has the cores of those that are not there.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
