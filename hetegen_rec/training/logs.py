"""What a stage writes down as it trains: log.jsonl and TensorBoard curves."""

import json
import time
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard.writer import SummaryWriter

_FIELD_CURVES = {
    "loss": "field_loss",
    "relative": "field_relative_loss_r",
    "difficulty": "field_difficulty_s",
    "weight": "field_weight_w",
}
"""TensorBoard's groups of the values that a line of the log gives for every field."""
_POSITIONS = ("epoch", "rows")
"""Where a line stands in training: no curves."""


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

    def __exit__(self, *exception: object) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


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
