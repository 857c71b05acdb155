"""What the ranks of a trial leave behind for the verdict, as files that survive a SIGKILL."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks.chaos.plan import Kill


@dataclass(frozen=True, order=True)
class AttemptId:
    """Which start of the ranks: of the launcher, and by the launcher."""

    launch: int
    """Starts of the launcher before."""
    restart: int
    """Restarts of the ranks by this launcher before."""


@dataclass(frozen=True)
class TrainedRows:
    """What one rank trained in one step."""

    epoch: int
    rows: tuple[int, ...]
    """Row ids, without padding."""


@dataclass
class Attempt:
    """One attempt that got as far as training."""

    id: AttemptId
    start: int
    """Steps taken before it."""
    steps: dict[int, dict[int, TrainedRows]] = field(default_factory=dict)
    """By step, then by rank."""


@dataclass(frozen=True)
class Completed:
    """A checkpoint that became complete."""

    attempt: AttemptId
    step: int


class RowsFile:
    """Writes what one rank trains in one attempt, a line a step."""

    def __init__(self, directory: Path, attempt: AttemptId, rank: int, start: int) -> None:
        path = directory / "rows" / f"{attempt.launch}.{attempt.restart}.{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("w", encoding="utf-8")
        self._write({"start": start})

    def add(self, step: int, rows: TrainedRows) -> None:
        """Notes a step, for good when this returns."""
        self._write({"step": step, "epoch": rows.epoch, "rows": rows.rows})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def read_attempts(directory: Path) -> list[Attempt]:
    """The attempts of a trial that got as far as training, in order."""
    attempts: dict[AttemptId, Attempt] = {}
    for path in (directory / "rows").glob("*.jsonl"):
        launch, restart, rank = map(int, path.stem.split("."))
        lines = list(_whole_lines(path))
        if lines:
            attempt_id = AttemptId(launch, restart)
            attempt = attempts.setdefault(attempt_id, Attempt(attempt_id, lines[0]["start"]))
            for line in lines[1:]:
                rows = TrainedRows(line["epoch"], tuple(line["rows"]))
                attempt.steps.setdefault(line["step"], {})[rank] = rows
    return [attempts[attempt_id] for attempt_id in sorted(attempts)]


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """A kill may cut the last line off; its step did not get to a checkpoint then."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def write_kills(directory: Path, kills: Sequence[Kill]) -> None:
    """Tells the ranks of a trial when to die."""
    (directory / "kills.json").write_text(json.dumps([asdict(kill) for kill in kills]), encoding="utf-8")


def read_kills(directory: Path) -> list[Kill]:
    """The kills of a trial, in order."""
    return [Kill(**values) for values in json.loads((directory / "kills.json").read_text(encoding="utf-8"))]


def note_strike(directory: Path) -> None:
    """Notes that the next kill of a trial takes place now."""
    (directory / f"strike-{count_strikes(directory)}").touch()


def count_strikes(directory: Path) -> int:
    """How many kills of a trial took place."""
    return len(list(directory.glob("strike-*")))


def note_completed(directory: Path, completed: Completed) -> None:
    """Notes a checkpoint that became complete right now."""
    with (directory / "completed.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(completed)) + "\n")


def read_completed(directory: Path) -> list[Completed]:
    """The checkpoints of a trial in the order in which they became complete."""
    path = directory / "completed.jsonl"
    lines = _whole_lines(path) if path.exists() else ()
    return [Completed(AttemptId(**line["attempt"]), line["step"]) for line in lines]


def write_passes(directory: Path, rank: int, passes: dict[str, int]) -> None:
    """Notes how often a rank came to each moment."""
    (directory / f"passes-{rank}.json").write_text(json.dumps(passes), encoding="utf-8")


def read_passes(directory: Path, rank: int) -> dict[str, int]:
    """What `write_passes` noted."""
    passes: dict[str, int] = json.loads((directory / f"passes-{rank}.json").read_text(encoding="utf-8"))
    return passes
