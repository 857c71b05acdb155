"""What finished and failed runs leave behind: one line of JSON each."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

FILE_NAME = "results.jsonl"


@dataclass(frozen=True)
class Record:
    """How a run came out."""

    run: str
    """Its id."""
    data_set: str
    method: str
    option: str
    seed: int
    status: Literal["done", "failed"]
    directory: str = ""
    """Where it was trained, below the directory of all runs."""
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Metrics by split, without curves; `slices` are those of `benchmarks.evidence.slices`."""
    wall_seconds: float = 0.0
    """All programs of the last attempt, start-up and final evaluation included."""
    cpu_seconds: float = 0.0
    """Of the same: what they would take on a core that nobody else uses."""
    peak_memory_mib: float = 0.0
    """Resident memory of the largest of them."""
    commit: str = ""
    finished: str = ""
    """Local time."""
    error: str = ""
    ways: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of a run that follows a log, by way: means over the tested periods (`auc`, `log_loss`, `gauc`) and over
    the updates (training `seconds`, `rows`), and `auc_by_period`."""

    @property
    def selection(self) -> float:
        """What settings are chosen by: AUC on valid."""
        return float(self.value("valid", "auc") or 0.0)

    def value(self, *path: str) -> float | None:
        """A number by its path in `splits`; None if it is not defined or not there."""
        found: Any = self.splits
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return found if isinstance(found, int | float) else None


class Ledger:
    """The records of a directory. One process at a time writes them."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._records = _read(self._path)

    @property
    def done(self) -> dict[str, Record]:
        """Finished runs by id."""
        return {run: record for run, record in self._records.items() if record.status == "done"}

    @property
    def failed(self) -> dict[str, Record]:
        """Runs whose last attempt failed, by id."""
        return {run: record for run, record in self._records.items() if record.status == "failed"}

    def add(self, record: Record) -> None:
        """Notes how a run came out, for good when this returns."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(record), allow_nan=False) + "\n"
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" + line if _is_cut_off(self._path) else line)
        self._records[record.run] = record

    def adopt(self, path: Path) -> int:
        """Takes over the finished runs of another directory's records that are not done here.

        Args:
            path: the records, such as those of another machine.

        Returns:
            How many.

        Raises:
            OSError: they cannot be read.
        """
        path.stat()  # a file that is not there is an error here, other than where runs begin
        done = self.done
        news = [one for run, one in _read(path).items() if one.status == "done" and run not in done]
        for record in news:
            self.add(record)
        return len(news)


def _is_cut_off(path: Path) -> bool:
    """Whether the last line of a file was not written to its end, because of a kill."""
    content = path.read_bytes()
    return bool(content) and not content.endswith(b"\n")


def _read(path: Path) -> dict[str, Record]:
    """The newest record of every run; a line that a kill cut off is none."""
    records: dict[str, Record] = {}
    if not path.exists():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError):
            continue
        records.pop(record.run, None)
        records[record.run] = record
    return records
