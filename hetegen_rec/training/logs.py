"""What a run shows: log.jsonl and TensorBoard curves on disk, a progress bar for the person."""

import json
import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard.writer import SummaryWriter

logger = logging.getLogger(__name__)


class RunLog:
    """One stage's log.jsonl and TensorBoard files; does nothing on ranks other than 0."""

    def __init__(self, directory: Path, *, enabled: bool, tensorboard: bool) -> None:
        self._file: TextIO | None = None
        self._writer: SummaryWriter | None = None
        self._start = time.monotonic()
        if not enabled:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / "log.jsonl").open("w", encoding="utf-8")
        if tensorboard:
            self._writer = SummaryWriter(str(directory / "tensorboard"))

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Adds one line; nested numbers become curves named by their path."""
        if self._file is None:
            return
        seconds = round(time.monotonic() - self._start, 3)
        line = {"event": event, "step": step, "seconds": seconds, **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in _flatten(values, event):
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _flatten(values: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    """Curves by path; per-field values are grouped by quantity: `train/weight/<field>`."""
    curves: list[tuple[str, float]] = []
    for key, value in values.items():
        if key == "fields":
            curves += [
                (f"{quantity}/{name}", number)
                for name, numbers in value.items()
                for quantity, number in numbers.items()
            ]
        elif isinstance(value, dict):
            curves += _flatten(value, f"{prefix}/{key}")
        elif isinstance(value, int | float):
            curves.append((f"{prefix}/{key}", float(value)))
    return curves


class StageProgress:
    """Progress bar of a stage on rank 0: steps, samples/s, loss, time left.

    Where the output is no terminal (a log file, torchx), a line is logged now and then instead.
    """

    SECONDS_BETWEEN_LINES = 15.0

    def __init__(self, title: str, total_steps: int, *, enabled: bool) -> None:
        self._title, self._total, self._enabled = title, total_steps, enabled
        self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>9,.0f} samples/s"),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=Console(),
            disable=not enabled or not Console().is_terminal,
        )
        self._task = self._bar.add_task(title, total=total_steps, rate=0.0, loss=0.0, note="")

    def advance(self) -> None:
        """One more step."""
        self._bar.advance(self._task)

    def show(self, step: int, rate: float, loss: float) -> None:
        """Fresh numbers."""
        self._bar.update(self._task, rate=rate, loss=loss)
        now = time.monotonic()
        if not self._bar.disable or not self._enabled:
            return
        if step == self._total or now - self._last_line >= self.SECONDS_BETWEEN_LINES:
            self._last_line = now
            template = "%s: step %d of %d, %s samples/s, loss %.4f"
            logger.info(template, self._title, step, self._total, f"{rate:,.0f}", loss)

    def note(self, text: str) -> None:
        """A word beside the bar, or a line of the log."""
        self._bar.update(self._task, note=text)
        if self._enabled and self._bar.disable:
            logger.info("%s: %s", self._title, text)

    def __enter__(self) -> "StageProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leaves the bar as it stands."""
        self._bar.stop()
