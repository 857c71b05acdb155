"""A peer as a workload: its environment, its process, and its turns."""

import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.throughput.click_log import ClickLog
from benchmarks.throughput.scenario import Case
from benchmarks.throughput.stopwatch import Turn
from hetegen_rec.data.encoded_rows import LABEL
from hetegen_rec.data.statistics import Statistics

FUXICTR = ("torch==2.13.0", "fuxictr==2.3.10")
_LOOP = Path(__file__).with_name("fuxictr_loop.py")
ENVIRONMENTS = Path("runs/peers")
_SECONDS_TO_END = 30


def peer_python(requirements: Sequence[str], environments: Path = ENVIRONMENTS) -> Path:
    """The Python of an environment that holds exactly these packages, made if it is not there.

    Raises:
        RuntimeError: pip could not install them; its words are in the message.
    """
    directory = environments / "+".join(requirements).replace("==", "-")
    python, done = directory / "bin" / "python", directory / ".done"
    if not done.exists():
        print(f"making the environment of {', '.join(requirements)}: minutes", file=sys.stderr)
        venv.create(directory, clear=True, with_pip=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install", *requirements]
        made = subprocess.run(pip, capture_output=True, text=True, check=False)
        if made.returncode:
            raise RuntimeError(f"{' '.join(pip)} failed:\n{made.stderr}")
        done.touch()
    return python


def fuxictr_settings(case: Case, log: ClickLog, steps: int, directory: Path) -> dict[str, Any]:
    """What FuxiCTR's loop needs to know: the same rows, sizes and rates."""
    config, budget = case.config, case.config.stage(case.stage)
    return {
        "model": config.model.backbone.name,
        "fields": log.config.names,
        "label": LABEL,
        "rows": [str(path) for path in log.paths],
        "table_rows": _largest_table(log.statistics),
        "dim": config.model.dim,
        "hidden": list(config.model.backbone.hidden),
        "num_layers": config.model.backbone.num_layers,
        "batch_size": config.train.batch_size,
        "dense_lr": budget.dense_lr,
        "max_grad_norm": budget.max_grad_norm or float("inf"),
        "steps": steps,
        "threads": torch.get_num_threads(),
        "directory": str(directory),
    }


def _largest_table(statistics: Statistics) -> int:
    return max(statistics.table_rows(name) for name in statistics.fields)


class PeerProcess:
    """A loop that runs in a process of its own and takes a turn when told."""

    def __init__(self, command: Sequence[str], stack: ExitStack) -> None:
        """Starts it and waits until it is ready.

        Args:
            command: the loop; it says `ready`, then answers every line with a turn as JSON.
            stack: ends the process.

        Raises:
            RuntimeError: it ended; what it said stands above.
        """
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(self._end)
        while self._line() != "ready":
            pass

    def turn(self) -> Turn:
        """Its next turn."""
        assert self._process.stdin is not None  # it was started with a pipe
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        return Turn(**json.loads(self._line()))

    def _line(self) -> str:
        assert self._process.stdout is not None  # it was started with a pipe
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer ended with exit code {self._process.wait()}; see above")
        return line.strip()

    def _end(self) -> None:
        assert self._process.stdin is not None  # it was started with a pipe
        self._process.stdin.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def open_fuxictr(case: Case, log: ClickLog, steps: int, directory: Path, stack: ExitStack) -> PeerProcess:
    """FuxiCTR's training of the same model on the same rows, in memory."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "settings.json"
    path.write_text(json.dumps(fuxictr_settings(case, log, steps, directory)), encoding="utf-8")
    return PeerProcess([str(peer_python(FUXICTR)), str(_LOOP), str(path)], stack)
