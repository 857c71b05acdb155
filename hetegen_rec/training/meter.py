"""Averages of what a step shows, kept on the device between two lines of the log."""

import time
from typing import Any

import torch
from torch import Tensor

from hetegen_rec.models.difficulty import Difficulty, Probe
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
        self._fields: tuple[Tensor, Tensor] | None = None
        self._probes: dict[str, list[Tensor]] = {}

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
            relative = outputs.fields.over_bins(outputs.fields.relative)
            cross_entropy = outputs.fields.over_bins(outputs.fields.cross_entropy)
            if self._fields is not None:
                cross_entropy = cross_entropy + self._fields[0]
                relative = relative + self._fields[1]
            self._fields = (cross_entropy, relative)
            self._add_probe(outputs.fields.probe)

    def _add_probe(self, probe: Probe | None) -> None:
        if probe is None:
            return
        self._probes.setdefault("gradient_share", []).append(probe.shares)
        if probe.alignment is not None:
            self._probes.setdefault("label_cosine", []).append(probe.alignment)

    def read(self, difficulty: Difficulty, names: list[str]) -> dict[str, Any]:
        """Means over the window and all ranks: rate, terms, and every field's l, r, s, w. A collective.

        Where a step of the window probed the gradients, every field also has its share of their norms and,
        with the label in the set, the cosine with the gradient of the label loss.
        `loss` is the sum of the terms without the calibration of s, which is no measure of fit.
        """
        # A rank's terms are those of its own rows, scaled so that the global ones are their mean.
        totals = mean_over_ranks(torch.stack(list(self._terms.values())).float()) / self._steps
        terms = dict(zip(self._terms, totals.tolist(), strict=True))
        loss = sum(value for name, value in terms.items() if name != "calibration")
        rate = self._rows / max(time.monotonic() - self._start, 1e-9)
        values: dict[str, Any] = {"samples_per_second": round(rate, 1), "loss": loss, "terms": terms}
        if self._fields is not None:
            cross_entropy, relative = (total / self._steps for total in self._fields)
            columns = {
                "loss": cross_entropy,
                "relative": relative,
                "difficulty": difficulty.scalars.mean(1),
                "weight": difficulty.weights().mean(1),
                **{key: torch.stack(probes).mean(0) for key, probes in self._probes.items()},
            }
            rows = torch.stack(list(columns.values()), dim=1).tolist()
            values["fields"] = {
                name: dict(zip(columns, row, strict=True)) for name, row in zip(names, rows, strict=True)
            }
        return values
