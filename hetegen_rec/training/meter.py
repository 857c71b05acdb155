"""Averages of what a step shows, kept on the device between two lines of the log."""

import time
from typing import Any

import torch
from torch import Tensor

from hetegen_rec.models.difficulty import Difficulty, FieldLosses
from hetegen_rec.models.network import Outputs
from hetegen_rec.models.reduction import mean_over_ranks


class Meter:
    """Collects the outputs of a few steps; reading it is the only wait for the device."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts a new window."""
        self._steps = 0
        self._rows = 0
        self._start = time.monotonic()
        self._terms: dict[str, Tensor] = {}
        self._fields: dict[str, Tensor] = {}
        """[2, F] by measure: sum over the steps in which a field has a value, and their number."""

    @property
    def is_empty(self) -> bool:
        """Whether no step was added to the window, as where all were skipped."""
        return self._steps == 0

    def add(self, outputs: Outputs, rows: int) -> None:
        """Adds one step of `rows` rows over all ranks."""
        self._steps += 1
        self._rows += rows
        for name, term in outputs.terms.items():
            self._terms[name] = self._terms.get(name, torch.zeros_like(term)) + term
        if outputs.fields is not None:
            self._add_losses(outputs.fields)

    def _add_losses(self, fields: FieldLosses) -> None:
        seen, probe = fields.seen.any(1), fields.probe
        self._add_measure("loss", fields.over_bins(fields.cross_entropy), seen)
        self._add_measure("relative", fields.over_bins(fields.relative), seen)
        if probe is None:
            return
        # Without a target a field takes none of the gradient, but has no direction.
        self._add_measure("gradient_share", probe.shares, torch.ones_like(seen))
        if probe.alignment is not None:
            self._add_measure("label_cosine", probe.alignment, seen)

    def _add_measure(self, name: str, values: Tensor, has_value: Tensor) -> None:
        """Adds the values [F] of one step, as far as the fields have one."""
        sums = torch.stack([values.where(has_value, 0.0), has_value.to(values.dtype)])
        self._fields[name] = self._fields.get(name, torch.zeros_like(sums)) + sums

    def read(self, difficulty: Difficulty, names: list[str]) -> dict[str, Any]:
        """Means over the window and all ranks: rate, terms, and every field's l, r, s, w. A collective.

        l and r are means over the steps in which the field had a target, and left out if there was none.
        Where a step of the window probed the gradients, every field also has its share of their norms and,
        with the label in the set and where it had a target, the cosine with the gradient of the label loss.
        `loss` is the sum of the terms without the calibration of s, which is no measure of fit.
        """
        # A rank's terms are those of its own rows, scaled so that the global ones are their mean.
        totals = mean_over_ranks(torch.stack(list(self._terms.values())).float()) / self._steps
        terms = dict(zip(self._terms, totals.tolist(), strict=True))
        loss = sum(value for name, value in terms.items() if name != "calibration")
        rate = self._rows / max(time.monotonic() - self._start, 1e-9)
        values: dict[str, Any] = {"samples_per_second": round(rate, 1), "loss": loss, "terms": terms}
        if self._fields:
            values["fields"] = self._of_fields(difficulty, names)
        return values

    def _of_fields(self, difficulty: Difficulty, names: list[str]) -> dict[str, dict[str, float]]:
        """The measures of every field that have a value."""
        weights = difficulty.over_targets(difficulty.weights())
        now = {"difficulty": difficulty.scalars.mean(1), "weight": weights}
        columns = self._fields | {key: torch.stack([one, torch.ones_like(one)]) for key, one in now.items()}
        sums, counts = torch.stack(list(columns.values()), dim=2)  # [F, measures] each
        rows = zip(names, (sums / counts).tolist(), counts.tolist(), strict=True)
        return {
            name: {key: mean for key, mean, count in zip(columns, means, steps, strict=True) if count}
            for name, means, steps in rows
        }
