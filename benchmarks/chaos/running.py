"""Running one training to its end, however often it is killed on the way."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.chaos.plan import Kill, Launcher, Trial
from benchmarks.chaos.records import count_strikes, read_attempts, read_completed, write_kills
from benchmarks.chaos.verdict import (
    Outcome,
    effective_steps,
    read_outcome,
    resume_problems,
    row_problems,
    tensor_problems,
    value_problems,
)
from hetegen_rec.training.checkpoint import CheckpointError

RANKS = 2

_CHECKOUT = Path(__file__).parents[2]
_LAUNCH_SECONDS = 600.0
"""Longer than any launch takes; one that hangs fails the trial instead of the campaign."""


class RunError(RuntimeError):
    """A training did not get to its end. The message says how it ended and where its output is."""


@dataclass(frozen=True)
class Verdict:
    """What was wrong with a trial, one line each; three empty lists if all was well."""

    resuming: list[str]
    """It did not get to its end, or not from where it stood."""
    bits: list[str]
    """It ended with something else than the reference."""
    rows: list[str]
    """Not every row was trained exactly once per epoch."""
    attempts: int = 0
    """Attempts that got as far as training."""

    @property
    def problems(self) -> list[str]:
        """All of them."""
        return [*self.resuming, *self.bits, *self.rows]


def run_reference(directory: Path) -> Outcome:
    """Trains undisturbed.

    Raises:
        RunError: it failed, or did not train every row exactly once.
    """
    _run_to_end(directory, "hetegen", ())
    outcome = read_outcome(directory / "run" / "joint")
    problems = row_problems(effective_steps(read_attempts(directory)), RANKS, outcome)
    if problems:
        raise RunError(f"the undisturbed training in {directory}: {'; '.join(problems)}")
    return outcome


def run_trial(trial: Trial, directory: Path, reference: Outcome) -> Verdict:
    """Trains, kills as planned, starts again, and judges."""
    try:
        _run_to_end(directory, trial.launcher, trial.kills)
        outcome = read_outcome(directory / "run" / "joint")
    except (RunError, CheckpointError) as error:
        unknown = ["the training was not finished"]
        return Verdict([str(error)], unknown, unknown, len(read_attempts(directory)))
    attempts = read_attempts(directory)
    never = [f"the kill at {kill} never came" for kill in trial.kills[count_strikes(directory) :]]
    return Verdict(
        resuming=never + resume_problems(attempts, read_completed(directory)),
        bits=tensor_problems(reference.tensors, outcome.tensors)
        + value_problems(reference.values, outcome.values),
        rows=row_problems(effective_steps(attempts), RANKS, reference),
        attempts=len(attempts),
    )


def _run_to_end(directory: Path, launcher: Launcher, kills: tuple[Kill, ...]) -> None:
    """Starts the launcher, and again each time that a kill took it too.

    Raises:
        RunError: it ended otherwise than with 0, or not in time.
    """
    directory.mkdir(parents=True)
    write_kills(directory, kills)
    restarts = sum(kill.victims != "all" for kill in kills)  # no more, to hide no other failure
    for launch in range(1 + len(kills) - restarts):
        log = directory / f"launch-{launch}.log"
        strikes_before = count_strikes(directory)
        code = _launch(_command(launcher, restarts, directory, launch), log)
        if code == 0:
            return
        struck = kills[strikes_before : count_strikes(directory)]
        if not any(kill.victims == "all" for kill in struck):
            raise RunError(f"{launcher} ended with exit code {code}: {log}")
    raise RunError(f"{launcher} was killed more often than planned: {directory}")


def _command(launcher: Launcher, restarts: int, directory: Path, launch: int) -> list[str]:
    rank = ["-m", "benchmarks.chaos.rank", str(directory), str(launch)]
    if launcher == "hetegen":
        return [sys.executable, *rank, "--ranks", str(RANKS), "--max-restarts", str(restarts)]
    options = ["--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", str(restarts)]
    return [sys.executable, "-m", "torch.distributed.run", *options, *rank]


def _launch(command: list[str], log: Path) -> int:
    """The exit code of a launcher.

    Raises:
        RunError: it did not end in time.
    """
    with log.open("wb") as output:
        process = psutil.Popen(command, cwd=_CHECKOUT, stdout=output, stderr=subprocess.STDOUT)
    with _ended_with_its_ranks(process):
        try:
            return int(process.wait(_LAUNCH_SECONDS))
        except psutil.TimeoutExpired as error:
            raise RunError(f"not done after {_LAUNCH_SECONDS:g} s: {log}") from error


@contextmanager
def _ended_with_its_ranks(launcher: psutil.Popen) -> Iterator[None]:
    """Context at the end of which the launcher and its ranks are gone, also where Ctrl-C ends it."""
    try:
        yield
    finally:
        ranks = launcher.children(recursive=True) if launcher.is_running() else []
        for process in [launcher, *ranks]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
