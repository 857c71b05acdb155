"""Trusts rarely seen ids less, and scores rows on several paths that are uncertain all the same.

Reported for UTTSI (arXiv 2605.24989), which needs no training: uncertainty is logit confidence times a
frequency prior; unreliable embeddings are filtered in all rows; only uncertain rows get stochastic paths, in
an ensemble weighted by consistency; the mean cost is about 2.8 passes. The formulas are derived
(docs/method.md section 11).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetegen_rec.config.inference import UncertaintyConfig
from hetegen_rec.inference.noise import path_noise, row_keys
from hetegen_rec.inference.strategy import Network, Rows, Scored, every_row

_RAMP = 0.1  # share of the threshold above it over which the ensemble takes over from the first pass
_LEAST_THRESHOLD = 1e-6  # below which a row has no unreliable cell
_LEAST_VARIANCE = 1e-12  # of the logits of paths that agree


class Clicks(Protocol):
    """What `Statistics` knows of clicks, and an artifact too."""

    @property
    def num_rows(self) -> int:
        """Training rows."""
        ...

    @property
    def num_positives(self) -> int:
        """Those with a click."""
        ...


@dataclass(frozen=True)
class FirstPass:
    """What one pass says of B rows."""

    reliability: Tensor
    """[B, T] in (0, 1]: of each token; 1 where there is none."""
    logits: Tensor
    """[B]: of a click."""
    uncertainty: Tensor
    """[B] in [0, 1)."""


class Uncertainty:
    """One pass for all rows; for uncertain ones paths on which cells are kept with their reliability.

    The reliability of a table row seen n times is `min(1, n / reliable_count)`. The filter of the first pass
    is the mean of what the paths draw: `r e + (1 - r) d`, with d standing for a dropped token. A row is
    uncertain where its score says little beyond the click rate and its tokens are unreliable.
    """

    def __init__(
        self,
        network: Network,
        clicks: Clicks,
        dropped: Tensor,
        config: UncertaintyConfig,
        seed: int,
        threshold: float = float("inf"),
    ) -> None:
        """Sets the strategy up.

        Args:
            network: scores rows.
            clicks: of the training rows.
            dropped: [T, D], what stands for a dropped token.
            config: how many paths.
            seed: of the paths.
            threshold: uncertainty from which rows get them.
        """
        self._network, self.dropped, self._config, self._seed = network, dropped, config, seed
        self._num_rows = clicks.num_rows
        rate = (clicks.num_positives + 0.5) / (clicks.num_rows + 1.0)
        self._base_logit = float(np.log(rate) - np.log1p(-rate))
        self.threshold = threshold

    @property
    def settings(self) -> Mapping[str, float]:
        """The threshold, as 1 where no row can be above it, and the most passes that a row can take."""
        return {"threshold": min(self.threshold, 1.0), "most_passes": 1.0 + self._config.paths}

    def score(self, rows: Rows) -> Scored:
        """The first pass, and for rows above the threshold more and more of the ensemble."""
        first = self.first_pass(rows)
        probabilities, passes = first.logits.sigmoid(), every_row(rows, 1.0)
        excess = first.uncertainty / max(self.threshold, _LEAST_THRESHOLD) - 1.0
        share = (excess / _RAMP).clamp(0.0, 1.0)  # [B]
        index = share.nonzero().squeeze(1)
        if len(index):
            ensemble = self._ensemble(rows, first, index)
            share = share[index]
            probabilities[index] = (1.0 - share) * probabilities[index] + share * ensemble
            passes[index] += self._config.paths
        return Scored(probabilities, passes)

    def first_pass(self, rows: Rows) -> FirstPass:
        """Scores all rows once, and says how far to trust that."""
        reliability = self.reliability(rows)
        tokens = rows.tokens
        if self._config.filter:
            weight = reliability[..., None].to(tokens.dtype)
            stand_in = self.dropped.to(tokens.dtype)
            tokens = torch.where(weight < 1.0, stand_in + weight * (tokens - stand_in), tokens)
        logits = self._network.score(tokens, rows.present)
        indifference = 1.0 - (2.0 * (logits - self._base_logit).sigmoid() - 1.0).abs()
        rarity = (1.0 - reliability).sum(1) / rows.present.sum(1).clamp(min=1)
        return FirstPass(reliability, logits, indifference * rarity.to(logits.dtype))

    def reliability(self, rows: Rows) -> Tensor:
        """[B, T] in (0, 1]: of each token; 1 where there is none.

        Counts are taken back out of their logarithms, to a half, which stands for "never" (see
        `Statistics.log_rate`). Of double precision, so that no cell's fate hangs on the size of a batch.
        """
        seen = torch.round(2.0 * rows.log_rate.double().exp() * self._num_rows) / 2.0
        reliability = (seen / self._config.reliable_count).clamp(max=1.0)
        return torch.where(rows.present, reliability, 1.0)

    def _ensemble(self, rows: Rows, first: FirstPass, index: Tensor) -> Tensor:
        """[n] probabilities of the rows at `index` [n]: of all passes, weighted by their consistency."""
        clean, present, reliability = rows.tokens[index], rows.present[index], first.reliability[index]
        keys = row_keys(rows.ids[index])
        stand_in = self.dropped.to(clean.dtype)
        logits = [first.logits[index]]
        for path in range(self._config.paths):
            kept = path_noise(keys, reliability.shape[1], self._seed, path) < reliability
            tokens = torch.where(kept[..., None], clean, stand_in)
            logits.append(self._network.score(tokens, present))
        return consistent_mean(torch.stack(logits))


def consistent_mean(logits: Tensor) -> Tensor:
    """[P, n] logits of paths -> [n]: mean probability, each weighted by how close it is to the others.

    The weight is exp(-d^2 / 2), d the distance from the mean logit in standard deviations.
    """
    distance = (logits - logits.mean(0)).square()
    variance = distance.mean(0).clamp(min=_LEAST_VARIANCE)
    weights = torch.exp(-0.5 * distance / variance)
    return (weights * logits.sigmoid()).sum(0) / weights.sum(0)


def threshold_of(uncertainties: NDArray[np.float32], config: UncertaintyConfig) -> float:
    """The threshold above which as many of the rows are uncertain as `budget` pays paths for.

    Args:
        uncertainties: [N], at least one.
        config: budget, in passes of a row in the mean, and paths.
    """
    share = (config.budget - 1.0) / config.paths
    paid = int(share * len(uncertainties))
    if paid >= len(uncertainties):
        return 0.0
    descending = np.sort(uncertainties)[::-1]
    above = descending[max(paid - 1, 0)]
    return float((above + descending[paid]) / 2.0)
