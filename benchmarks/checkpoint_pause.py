"""How long training waits for a checkpoint: a synchronous save by DCP against CheckpointWriter, side by side.

    torchrun --nproc-per-node 2 -m benchmarks.checkpoint_pause --out benchmarks/results/checkpoint_pause.md

Joint training of a model with two large hashed tables, cut into rows. Every repeat measures one after another
in the same processes: steps alone; a synchronous save; a save in the background, with steps until it is on
disk. Times are those of the slowest rank. Both ways sync every file to the disk.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.state_dict_saver import save as save_synchronously

from benchmarks.machine import commit, processor
from hetegen_rec.config.run import RunConfig
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.terminal import quiet_libraries
from hetegen_rec.training.checkpoint import Checkpoints, complete_steps
from hetegen_rec.training.checkpoint_writer import CheckpointWriter
from hetegen_rec.training.setup import build_sharded, open_split, optimizer_of
from hetegen_rec.training.stages import prepare_data

DIM = 64
_MIB = 1 << 20
_WIDTH = 115


@dataclass(frozen=True)
class Repeat:
    """What one repeat took, on the rank where it took most: seconds, and bytes above what was held before."""

    step_alone: float
    synchronous: float
    synchronous_memory: int
    pause: float
    """Of training, for a save in the background."""
    background: float
    """From the call of `save` until the checkpoint is complete, while training goes on."""
    background_memory: int
    """In the first repeat with the buffers, which stay."""
    step_meanwhile: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints the table."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=1536, help="size of both tables together")
    parser.add_argument("--repeats", type=int, default=7, help="at least 2: the first save makes the buffers")
    parser.add_argument("--steps", type=int, default=10, help="steps alone in a repeat")
    parser.add_argument("--directory", type=Path, default=Path("runs"), help="where to write, on what disk")
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args(given)
    quiet_libraries()
    with start_runtime("cpu") as runtime, _scratch(options.directory, runtime) as directory:
        job = Job(config_of(directory, options.mib), directory, runtime)
        repeats, state_bytes = [job.repeat(options.steps) for _ in range(options.repeats)], job.state_bytes
        if runtime.is_main:
            lines = [*report(repeats, state_bytes, runtime.world_size), "", *_how_made(runtime, given)]
            print("\n".join(lines))
            if options.out is not None:
                options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def config_of(directory: Path, mib: int) -> RunConfig:
    """Joint training on generated rows; the two tables have `mib` MiB together."""
    rows = mib * _MIB // (2 * DIM * 4)
    hashed = {"kind": "id", "vocabulary": "hash", "hash_size": rows}
    values: dict[str, Any] = {
        "name": "checkpoint_pause",
        "run_dir": str(directory / "run"),
        "data": {
            "source": {"name": "synthetic", "rows": 20_000},
            "raw_dir": str(directory / "raw"),
            "prepared_dir": str(directory / "prepared"),
        },
        "features": {
            "label": "label",
            "fields": [
                {"name": "user_id", **hashed},
                {"name": "item_id", **hashed},
                {"name": "segment", "kind": "categorical"},
                {"name": "tags", "kind": "multi_valued", "max_length": 3},
                {"name": "price", "kind": "numeric"},
                {"name": "history", "kind": "sequence", "table": "item_id", "max_length": 5},
            ],
        },
        "model": {"dim": DIM},
        "train": {"batch_size": 512},
        "distributed": {"tables": {"default": {"sharding": ["row_wise"]}}},
    }
    return RunConfig.model_validate(values)


class Job:
    """A sharded model that trains and saves. All methods are collectives."""

    def __init__(self, config: RunConfig, directory: Path, runtime: Runtime) -> None:
        self._runtime = runtime
        self._synchronous = directory / "synchronous"
        statistics_of_rows = prepare_data(config, runtime)
        model = build_sharded(config, "joint", statistics_of_rows, runtime)
        self._dmp = model.dmp.train()
        self._optimizer = optimizer_of(config, "joint", model)
        reader = open_split(config, "train", statistics_of_rows, runtime, stage="joint", train=True)
        self._batches = list(islice(reader.epoch(Cursor()), 10))
        self._steps(len(self._batches))  # warm
        checkpoints = Checkpoints(str(directory / "background"), runtime, "benchmark")
        self._store = checkpoints.store
        self._writer = CheckpointWriter(checkpoints, runtime, keep=1, failed_writes_allowed=0)
        self._saved = 0

    @property
    def state_bytes(self) -> int:
        """Of all ranks; what is replicated counts once."""
        mine = _bytes_of(self._state(), replicated=self._runtime.is_main)
        return sum(self._runtime.gather(mine))

    def repeat(self, steps: int) -> Repeat:
        """One round of everything that is compared."""
        step_alone = statistics.median(self._steps(steps))
        self._remove_synchronous()
        with _peak_memory() as synchronous_memory:
            synchronous = self._seconds(self._save_synchronously)
        with _peak_memory() as background_memory:
            start = time.monotonic()
            pause = self._seconds(self._begin_save)
            meanwhile = self._steps_until_written()
            background = time.monotonic() - start
        self._writer.wait()
        return Repeat(
            step_alone=self._most(step_alone),
            synchronous=synchronous,
            synchronous_memory=int(self._most(synchronous_memory[0])),
            pause=pause,
            background=self._most(background),
            background_memory=int(self._most(background_memory[0])),
            step_meanwhile=self._most(statistics.median(meanwhile)),
        )

    def _steps(self, count: int) -> list[float]:
        """Seconds of each of so many steps."""
        seconds = []
        for index in range(count):
            start = time.monotonic()
            self._optimizer.zero_grad()
            loss, _ = self._dmp(self._batches[index % len(self._batches)])
            loss.backward()
            self._optimizer.step()
            seconds.append(time.monotonic() - start)
        return seconds

    def _steps_until_written(self) -> list[float]:
        seconds = self._steps(1)
        while not self._runtime.broadcast(self._saved in complete_steps(self._store)):
            seconds += self._steps(1)
        return seconds

    def _state(self) -> dict[str, Any]:
        return {"model": self._dmp.state_dict(), "optimizer": self._optimizer.state_dict()}

    def _save_synchronously(self) -> None:
        save_synchronously(self._state(), checkpoint_id=self._synchronous)

    def _remove_synchronous(self) -> None:
        if self._runtime.is_main:
            shutil.rmtree(self._synchronous, ignore_errors=True)

    def _begin_save(self) -> None:
        self._saved += 1
        self._writer.save(self._saved, self._dmp, self._optimizer, {})

    def _seconds(self, call: Callable[[], None]) -> float:
        """Of the slowest rank from a common start."""
        self._runtime.gather(None)
        start = time.monotonic()
        call()
        return self._most(time.monotonic() - start)

    def _most(self, value: float) -> float:
        return max(self._runtime.gather(value))


def report(repeats: Sequence[Repeat], state_bytes: int, ranks: int) -> list[str]:
    """Markdown lines: medians over the repeats, with the least and the most."""
    first, *later = repeats
    synchronous = [one.synchronous for one in repeats]
    pauses = [one.pause for one in later]
    share = statistics.median(one.pause / one.synchronous for one in later)
    slower = [one.step_meanwhile / one.step_alone for one in repeats]
    return [
        "# What training waits for when a checkpoint is written",
        "",
        f"State of {state_bytes / _MIB:,.0f} MiB (weights and optimizer) on {ranks} ranks, "
        f"{len(repeats)} repeats.",
        "",
        "| | median | least to most |",
        "|---|---|---|",
        _line("training waits: synchronous `torch.distributed.checkpoint.save`", "s", synchronous),
        _line("training waits: `CheckpointWriter.save`", "s", pauses),
        _line(
            "training waits: the first `CheckpointWriter.save`, which makes the buffers", "s", [first.pause]
        ),
        _line("the background write, from the call to the marker", "s", [one.background for one in repeats]),
        _line("a step alone", "s", [one.step_alone for one in repeats]),
        _line("a step during the background write", "s", [one.step_meanwhile for one in repeats]),
        _line("a step during the background write / alone", "times", slower),
        _line(
            "memory of a rank: synchronous save", "MiB", [one.synchronous_memory / _MIB for one in repeats]
        ),
        _line(
            "memory of a rank: first background save, buffers included",
            "MiB",
            [first.background_memory / _MIB],
        ),
        _line(
            "memory of a rank: later ones, beyond the buffers",
            "MiB",
            [one.background_memory / _MIB for one in later],
        ),
        "",
        f"Training waits for {100 * share:.0f} % of the time of a synchronous save (median over repeats), "
        f"for {100 * first.pause / first.synchronous:.0f} % at the first one.",
    ]


def _line(what: str, unit: str, values: Sequence[float]) -> str:
    median = f"{statistics.median(values):,.3g} {unit}"
    spread = f"{min(values):,.3g} to {max(values):,.3g}" if len(values) > 1 else ""
    return f"| {what} | {median} | {spread} |"


def _how_made(runtime: Runtime, arguments: Sequence[str]) -> list[str]:
    """The command, the commit and the machine."""
    command = ["torchrun", "--nproc-per-node", str(runtime.world_size), "-m", "benchmarks.checkpoint_pause"]
    text = (
        f"`{' '.join([*command, *arguments])}` at commit {commit()}, on "
        f"{os.cpu_count()} cores of {processor()} with {torch.get_num_threads()} thread(s) a rank, "
        f"{platform.system()} {platform.release()}, torch {torch.__version__}. Load of the machine over the "
        f"last five minutes: {os.getloadavg()[1]:.1f}."
    )
    return textwrap.wrap(text, _WIDTH, break_on_hyphens=False)


def _bytes_of(value: Any, *, replicated: bool) -> int:
    """Of this rank's shards, and of plain tensors where those are to be counted."""
    if isinstance(value, Mapping):
        return sum(_bytes_of(part, replicated=replicated) for part in value.values())
    if isinstance(value, ShardedTensor):
        return sum(shard.tensor.nbytes for shard in value.local_shards())
    return value.nbytes if replicated and isinstance(value, torch.Tensor) else 0


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Yields a list for the bytes by which this process grew at the most within the context."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before = _memory("VmRSS")
    found: list[int] = []
    yield found
    found.append(_memory("VmHWM") - before)


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(kilobytes)


@contextmanager
def _scratch(parent: Path, runtime: Runtime) -> Iterator[Path]:
    """A directory that all ranks share, removed at the end."""
    directory = parent / f"checkpoint_pause-{runtime.job_id}"
    try:
        yield directory
    finally:
        if runtime.is_main:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
