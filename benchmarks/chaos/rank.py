"""One rank of a trial: the product's own command, with probes put around it from outside.

    python -m benchmarks.chaos.rank DIRECTORY LAUNCH            one rank, under a launcher
    python -m benchmarks.chaos.rank DIRECTORY LAUNCH --ranks 2  the launcher of `hetegen --ranks 2`

DIRECTORY is the trial's, LAUNCH tells its attempts apart.
"""

import argparse
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from threading import Timer
from typing import Any

import psutil
import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from benchmarks.chaos.plan import Kill
from benchmarks.chaos.records import (
    AttemptId,
    Completed,
    RowsFile,
    TrainedRows,
    count_strikes,
    note_completed,
    note_strike,
    read_kills,
    write_passes,
)
from hetegen_rec.cli import main as hetegen
from hetegen_rec.launching.relaunch import relaunch
from hetegen_rec.models.network import Outputs
from hetegen_rec.training import stages, trained, trainer
from hetegen_rec.training.checkpoint import METADATA, Checkpoints
from hetegen_rec.training.checkpoint_store import Store, _DigestingStream
from hetegen_rec.training.logs import RunLog
from hetegen_rec.training.progress import StageProgress
from hetegen_rec.training.staging import HostCopies
from hetegen_rec.training.trainer import Trainer


class Fate:
    """Counts how often this rank comes to each moment, and strikes when the trial's next kill is due."""

    def __init__(self, directory: Path, rank: int, attempt: AttemptId) -> None:
        self.directory, self.attempt = directory, attempt
        self.passes: Counter[str] = Counter()
        ahead = read_kills(directory)[count_strikes(directory) :]
        self._kill: Kill | None = ahead[0] if ahead and ahead[0].rank == rank else None

    def comes(self, moment: str) -> Kill | None:
        """Counts one pass of a moment; returns the kill that is due in it."""
        self.passes[moment] += 1
        kill = self._kill
        is_due = kill is not None and (kill.moment, kill.occurrence) == (moment, self.passes[moment])
        return kill if is_due else None

    def strike(self, kill: Kill) -> None:
        """Returns only if this rank is to live on."""
        launcher, others = _processes(self.directory)
        note_strike(self.directory)
        self._kill = None
        if kill.victims == "all":
            _kill([launcher, *others])  # the launcher first, so that it notices nothing
        elif kill.victims == "others":
            _kill(others)
        if kill.victims != "others":
            os.kill(os.getpid(), signal.SIGKILL)


def _processes(directory: Path) -> tuple[psutil.Process, list[psutil.Process]]:
    """The launcher, and all other processes that it started."""
    launcher = psutil.Process(os.getppid())
    if str(directory) not in launcher.cmdline():
        raise RuntimeError(f"process {launcher.pid}, the parent of this rank, is no launcher of this trial")
    return launcher, [one for one in launcher.children(recursive=True) if one.pid != os.getpid()]


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def put_probes(fate: Fate) -> None:
    """Puts a probe into every moment of `plan.MOMENTS`; a name that is not there any more is an error."""

    def at(moment: str) -> Callable[..., None]:
        def probe(*_: Any, **__: Any) -> None:
            kill = fate.comes(moment)
            if kill is not None:
                fate.strike(kill)

        return probe

    def before_marker(_draft: Path, name: Path) -> None:
        if name.name == METADATA:
            at("marker")()

    def in_removal(store: Store, name: str) -> None:
        directory = Path(store.path(name))
        kill = fate.comes("pruning") if directory.exists() else None
        if kill is not None:
            files = sorted(directory.iterdir())
            for path in files[: round(kill.fraction * len(files))]:
                path.unlink()
            fate.strike(kill)

    _put_during(fate, TrainPipelineSparseDist, "progress", "step")
    _put_during(fate, torch.Tensor, "backward", "backward")
    _put(HostCopies, "_copy_tensor", before=at("staging"))
    _put(_DigestingStream, "write", before=at("writing"))
    _put(Path, "replace", before=before_marker)
    _put(Store, "remove_directory", before=in_removal)
    _put(Trainer, "_between_batches", before=at("evaluation"))
    _put(trainer, "measure", before=at("evaluation"))
    _put(stages, "end_attempt", before=at("finish"))
    _put(trained, "score_rows", before=at("finish"))
    _put(trained, "write_predictions", before=at("finish"))
    _put(trained, "write_evaluation", before=at("finish"))
    _put(Checkpoints, "latest", before=at("start-up"))
    _put(Checkpoints, "load", before=at("start-up"))
    _put(RunLog, "__init__", before=at("start-up"))
    _put(Trainer, "run", before=at("start-up"))


def put_records(fate: Fate) -> None:
    """Has every step that this rank trains noted with its rows, and every checkpoint that is complete."""
    files: list[RowsFile] = []

    def start(stage: Trainer) -> None:
        files.append(RowsFile(fate.directory, fate.attempt, stage.runtime.rank, stage.state.step))

    def note(stage: Trainer, outputs: Outputs, _progress: StageProgress) -> None:
        rows = outputs.batch.row_ids
        trained = TrainedRows(stage.state.cursor.epoch, tuple(rows[rows >= 0].tolist()))
        files[-1].add(stage.state.step, trained)

    def after_marker(_draft: Path, name: Path) -> None:
        if name.name == METADATA:
            step = int(name.parent.name.removeprefix("step-"))
            note_completed(fate.directory, Completed(fate.attempt, step))

    _put(Trainer, "run", before=start)
    _put(Trainer, "_take_note", after=note)
    _put(Path, "replace", after=after_marker)


def _put(
    owner: Any, name: str, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
) -> None:
    """Has a function or method call a probe, with its own arguments, before or after it runs."""
    original = getattr(owner, name)

    @wraps(original)
    def probed(*arguments: Any, **options: Any) -> Any:
        if before is not None:
            before(*arguments, **options)
        result = original(*arguments, **options)
        if after is not None:
            after(*arguments, **options)
        return result

    setattr(owner, name, probed)


def _put_during(fate: Fate, owner: Any, name: str, moment: str) -> None:
    """Has a thread strike while a method runs, after a share of the time that its last run took."""
    original = getattr(owner, name)
    seconds = 0.0

    @wraps(original)
    def probed(*arguments: Any, **options: Any) -> Any:
        nonlocal seconds
        kill = fate.comes(moment)
        if kill is not None:
            Timer(kill.fraction * seconds, fate.strike, [kill]).start()
        start = time.perf_counter()
        result = original(*arguments, **options)
        seconds = time.perf_counter() - start
        return result

    setattr(owner, name, probed)


def main() -> int:
    """Trains, or starts the ranks that do; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path, help="of the trial")
    parser.add_argument("launch", type=int, help="starts of the launcher before this one")
    parser.add_argument("--ranks", type=int, help="start so many ranks")
    parser.add_argument("--max-restarts", type=int, default=0, help="how often to start them again")
    options = parser.parse_args()
    if options.ranks:
        arguments = [str(options.directory), str(options.launch)]
        return relaunch("benchmarks.chaos.rank", options.ranks, arguments, options.max_restarts)
    rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    fate = Fate(options.directory, rank, AttemptId(options.launch, restart))
    put_probes(fate)
    put_records(fate)
    config = str(options.directory.parent / "config.yaml")
    code = hetegen(["joint", "--config", config, f"run_dir={options.directory / 'run'}"])
    write_passes(options.directory, rank, dict(fate.passes))
    return code


if __name__ == "__main__":
    sys.exit(main())
