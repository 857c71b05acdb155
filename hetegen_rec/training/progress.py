"""Progress for the person in front: bars on a terminal, a line now and then elsewhere."""

import logging
import time
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hetegen_rec import terminal

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15.0
"""Where the output is no terminal (a log file, torchx)."""

_Shown = TypeVar("_Shown", bound="_LiveBar")


class _LiveBar:
    """Context in which a bar is on the screen; it stays there as it stands at the end."""

    _bar: Progress

    def __enter__(self: _Shown) -> _Shown:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


class StageProgress(_LiveBar):
    """Progress of a stage on rank 0: steps, samples/s, loss, time left, and the latest evaluation."""

    def __init__(self, title: str, total_steps: int, steps_done: int, *, enabled: bool) -> None:
        self._title, self._total, self._enabled = title, total_steps, enabled
        self._last_line = time.monotonic()
        self._has_bar = enabled and terminal.messages().is_terminal
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>9,.0f} samples/s"),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=terminal.messages(),
            expand=True,
            disable=not self._has_bar,
        )
        self._task = self._bar.add_task(
            title, total=total_steps, completed=steps_done, rate=0.0, loss=0.0, note=""
        )

    def advance(self) -> None:
        """One more step."""
        self._bar.advance(self._task)

    def show(self, step: int, rate: float, loss: float) -> None:
        """Fresh numbers."""
        self._bar.update(self._task, rate=rate, loss=loss)
        now = time.monotonic()
        if self._has_bar or not self._enabled:
            return
        if step == self._total or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            template = "%s: step %d of %d, %s samples/s, loss %.4f"
            logger.info(template, self._title, step, self._total, f"{rate:,.0f}", loss)

    def note(self, text: str) -> None:
        """A word beside the bar, or a line of the log."""
        self._bar.update(self._task, note=text)
        if self._enabled and not self._has_bar:
            logger.info("%s: %s", self._title, text)


class RowsProgress(_LiveBar):
    """Progress of the passes of `prepare` on rank 0: a bar of rows for each pass, on a terminal only.

    An instance is what `prepare` wants as `progress`; elsewhere the log of the passes is enough.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._tasks: dict[str, TaskID] = {}
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows"),
            TimeRemainingColumn(),
            console=terminal.messages(),
            expand=True,
            disable=not (enabled and terminal.messages().is_terminal),
        )

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Rows done of a pass."""
        if phase not in self._tasks:
            self._tasks[phase] = self._bar.add_task(phase, total=total)
        self._bar.update(self._tasks[phase], completed=done)
