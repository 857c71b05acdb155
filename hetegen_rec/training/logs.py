"""What a stage writes down as it trains: log.jsonl and TensorBoard curves."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard.writer import SummaryWriter

from hetegen_rec.files import write_whole

_FIELD_CURVES = {
    "loss": "field_loss",
    "relative": "field_relative_loss_r",
    "difficulty": "field_difficulty_s",
    "weight": "field_weight_w",
    "gradient_share": "field_gradient_share",
    "label_cosine": "field_label_cosine",
}
"""TensorBoard's groups of the values that a line of the log gives for every field."""
_POSITIONS = ("epoch", "rows")
"""Where a line stands in training: no curves."""


class RunLog:
    """One stage's log.jsonl and TensorBoard files; does nothing on ranks other than 0."""

    def __init__(
        self, directory: Path, steps_done: int, *, is_evaluated: bool, enabled: bool, tensorboard: bool
    ) -> None:
        """Opens the files of a directory.

        Args:
            directory: of the stage; may hold the log of an earlier attempt.
            steps_done: where this attempt starts: what the earlier one wrote of later steps is dropped.
            is_evaluated: whether that step's evaluation, if it had one, counts too.
            enabled: whether to write at all.
            tensorboard: whether to write curves, too.
        """
        self._file: TextIO | None = None
        self._writer: SummaryWriter | None = None
        self._start = time.monotonic()
        if not enabled:
            return
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "log.jsonl"
        write_whole(path, "".join(_lines_until(path, steps_done, is_evaluated)))
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=steps_done + 1)

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

    def __exit__(self, *exception: object) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _lines_until(path: Path, step: int, is_evaluated: bool) -> Iterator[str]:
    """The lines of a log that tell of steps up to one; a line that a kill cut off is dropped."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            told = json.loads(line)
            is_repeated = told["event"] == "evaluation" and not is_evaluated
            if told["step"] < step or (told["step"] == step and not is_repeated):
                yield line
        except (ValueError, KeyError, TypeError):
            continue


def _flatten(values: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    """Curves by path; per-field values are grouped by quantity: `field_weight_w/<field>`."""
    curves: list[tuple[str, float]] = []
    for key, value in values.items():
        if key == "fields":
            curves += [
                (f"{_FIELD_CURVES[quantity]}/{name}", number)
                for name, numbers in value.items()
                for quantity, number in numbers.items()
            ]
        elif isinstance(value, dict):
            curves += _flatten(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and key not in _POSITIONS:
            curves.append((f"{prefix}/{key}", float(value)))
    return curves
