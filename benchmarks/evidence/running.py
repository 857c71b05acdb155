"""One run in programs of its own: its stages, its evaluation, and what that took."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.evidence.plan import Run
from benchmarks.evidence.records import Record
from benchmarks.evidence.slices import slice_metrics
from hetegen_rec.config.data import Split
from hetegen_rec.config.run import Stage
from hetegen_rec.evaluation.errors import EvaluationError
from hetegen_rec.evaluation.results import FILE_NAME as EVALUATION
from hetegen_rec.evaluation.results import read_evaluation
from hetegen_rec.evaluation.significance import read_predictions
from hetegen_rec.files import replace_directory
from hetegen_rec.training.attempts import is_done

HETEGEN = (sys.executable, "-m", "hetegen_rec.cli")

_EVALUATED: tuple[Split, ...] = ("valid", "test")
_LEFT_OUT = ("roc", "calibration_bins", "slices")
"""Curves, and slices by other bounds."""
_LINES_OF_A_FAILURE = 3


class RunError(RuntimeError):
    """A run did not come to its end. The message says how it ended and where its output is."""


class StoppedError(RuntimeError):
    """The programs were asked to stop; the run goes on another time."""


@dataclass(frozen=True)
class Usage:
    """What a program took."""

    seconds: float
    peak_memory_mib: float


class Programs:
    """The programs that run at the moment, so that all can be stopped at once, also by a signal's handler."""

    def __init__(self) -> None:
        self._running: set[int] = set()
        self._stopped = False

    def run(self, command: Sequence[str], log: Path, core: int) -> Usage:
        """Runs a program on one core to its end; several threads may call this.

        Args:
            command: its words.
            log: where its output is added.
            core: the only one that it may use, so that it makes one thread.

        Raises:
            RunError: it failed.
            StoppedError: it was stopped, or would have been started after `stop`.
        """
        if self._stopped:
            raise StoppedError
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with log.open("ab") as output:
            # In a session of its own: Ctrl-C reaches it through `stop`, once.
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        usage = self._wait(process, core)
        if self._stopped:
            raise StoppedError
        if process.returncode:
            raise RunError(f"exit code {process.returncode}: {_last_words(log)} ({log})")
        return Usage(time.monotonic() - start, usage.ru_maxrss / 1024)

    def stop(self) -> None:
        """Asks all programs to stop, which lets them save, and lets none start any more."""
        self._stopped = True
        for pid in list(self._running):
            _terminate(pid)

    def _wait(self, process: subprocess.Popen[bytes], core: int) -> resource.struct_rusage:
        os.sched_setaffinity(process.pid, {core})
        self._running.add(process.pid)
        if self._stopped:  # after it was started, and before it was known
            _terminate(process.pid)
        # Unlike `Popen.wait` this tells the largest memory that it, or one that it waited for, had.
        _, status, usage = os.wait4(process.pid, 0)
        self._running.discard(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        return usage


def _terminate(pid: int) -> None:
    # Not by `Popen.terminate`, which looks whether it has ended and so takes the status from `wait4`.
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def prepare(run: Run, programs: Programs, log: Path, core: int) -> None:
    """Prepares the data of a run's data set, for all of its runs.

    Raises:
        RunError, StoppedError: see `Programs.run`.
    """
    programs.run(_command("prepare", run, ()), log, core)


def execute(run: Run, core: int, *, out: Path, programs: Programs, commit: str) -> Record:
    """Trains and evaluates whatever of a run is not done yet.

    Args:
        run: which one; its data are prepared.
        core: on which it runs.
        out: directory of everything.
        programs: where its programs are counted in.
        commit: of the code.

    Returns:
        The record of the run, finished or failed.

    Raises:
        StoppedError: it was stopped.
    """
    record = Record(
        run=run.id,
        data_set=run.data_set,
        method=run.method,
        option=run.option,
        seed=run.seed,
        status="failed",
        directory=str(Path(run.config.run_dir).relative_to(out)),
        commit=commit,
    )
    try:
        usages = _train_and_evaluate(run, programs, core, out / "logs" / f"{run.id}.log")
        splits = _metrics(run)
        _keep_predictions(run, predictions_dir(out, run.id))
    except (RunError, EvaluationError) as error:
        return replace(record, error=str(error), finished=_now())
    return replace(
        record,
        status="done",
        splits=splits,
        train_seconds={stage: _train_seconds(run, stage) for stage in run.stages},
        wall_seconds=round(sum(usage.seconds for usage in usages), 1),
        peak_memory_mib=round(max(usage.peak_memory_mib for usage in usages), 1),
        finished=_now(),
    )


def predictions_dir(out: Path, run_id: str) -> Path:
    """Where the test predictions of a run stay, whatever else is scored with the same training later."""
    return out / "predictions" / run_id


def _train_and_evaluate(run: Run, programs: Programs, core: int, log: Path) -> list[Usage]:
    """A killed run goes on in here: a stage that is done takes the time of its start-up only."""
    stage_dir = run.config.stage_dir(run.click_stage)
    evaluated_before = (stage_dir / EVALUATION).exists()
    usages = []
    for stage in run.stages:
        usages.append(programs.run(_command(stage, run, ()), log, core))
        if not is_done(run.config, stage):
            raise RunError(f"{stage} was stopped by somebody else ({log})")
    # What stands there may be of other settings for scoring.
    if run.evaluate or evaluated_before:
        command = [*_command("evaluate", run, run.evaluate), "--stage", run.click_stage]
        usages.append(programs.run(command, log, core))
    return usages


def _command(verb: str, run: Run, more: Sequence[str]) -> list[str]:
    return [*HETEGEN, verb, "--config", run.config_path, *run.overrides, *more]


def _metrics(run: Run) -> dict[str, dict[str, Any]]:
    stage_dir = run.config.stage_dir(run.click_stage)
    evaluation = read_evaluation(stage_dir)
    if evaluation is None:
        raise RunError(f"{stage_dir} holds no evaluation")
    splits: dict[str, dict[str, Any]] = {}
    for split in _EVALUATED:
        predictions = read_predictions(stage_dir / "predictions" / split)
        if predictions is None:
            raise RunError(f"{stage_dir} holds no predictions of {split}")
        result = evaluation["splits"][split]
        splits[split] = {key: value for key, value in result.items() if key not in _LEFT_OUT}
        splits[split]["slices"] = slice_metrics(run.config, split, predictions)
    return splits


def _keep_predictions(run: Run, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(run.config.stage_dir(run.click_stage) / "predictions" / "test", partial)
    replace_directory(partial, target)


def _train_seconds(run: Run, stage: Stage) -> float:
    done = json.loads((run.config.stage_dir(stage) / "done.json").read_text(encoding="utf-8"))
    return float(done["seconds"])


def _last_words(log: Path) -> str:
    """What a failed program said: its `error:` line, or else its last ones."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")]
    return told[-1] if told else " / ".join(lines[-_LINES_OF_A_FAILURE:])


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")
