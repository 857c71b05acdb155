"""Two ranks, of which one hangs: both tell where they stand, and the job ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hetegen_rec.distributed.watchdog import HUNG

CHECKOUT = Path(__file__).parents[2]

RANK = """
import ctypes, os, signal, time
from pathlib import Path
from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.distributed.signals import StopRequest
from hetegen_rec.distributed.watchdog import Watchdog

def stuck_here():
    {hang}

with start_runtime("cpu", 5) as runtime, StopRequest() as stop:
    dog = Watchdog(5, runtime.rank, Path(f"stacks/rank-{{runtime.rank}}.txt"), stop)
    with dog.watching():
        for step in range(10):
            runtime.gather(step)
            dog.beat(f"step {{step + 1}}")
            if step == 3 and runtime.rank == 1:
                stuck_here()
"""

LAUNCHER = (
    "import sys; from hetegen_rec.launching.relaunch import relaunch; sys.exit(relaunch('rank', 2, []))"
)


@pytest.mark.parametrize(
    ("hang", "codes"),
    [
        ("time.sleep(600)", {HUNG}),
        ("ctypes.CDLL(None).sleep(600)", {HUNG}),
        ("ctypes.PyDLL(None).sleep(600)", {1, HUNG}),
        ("os.kill(os.getpid(), signal.SIGSTOP)", {HUNG}),
    ],
    ids=["in Python", "in C", "in C with the lock of Python", "stopped"],
)
def test_every_rank_tells_its_stack(tmp_path, hang, codes):
    (tmp_path / "rank.py").write_text(RANK.format(hang=hang))
    result = subprocess.run(
        [sys.executable, "-c", LAUNCHER],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode in codes, result.stderr
    # The ranks write to one stream at the same moment, in pieces that mix; their files do not.
    told = {path.stem: path.read_text() for path in (tmp_path / "stacks").iterdir()}
    assert "error: rank 0 stood still for 5 s in step 4 and ends." in told["rank-0"]
    assert "in gather" in told["rank-0"]
    # One that was stopped goes on once it is woken to end, and may fail in its next step before it tells.
    if "SIGSTOP" not in hang:
        assert "in stuck_here" in told.get("rank-1", "") or "in stuck_here" in result.stderr
