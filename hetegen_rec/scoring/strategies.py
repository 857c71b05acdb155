"""Test-time strategies of an artifact: those of `inference`, on graphs instead of a sharded model.

An artifact with strategies brings, besides its plain graph, one from ids to tokens and one from tokens to
logits, and in `strategies/` what training rows said:

| file | content |
|---|---|
| `dropped.npy` | [T, D] float32: what stands for a dropped token |
| `log_rate.npy` | float32, tables one behind the other: log of how often a training row looks each id up |
| `combinations.npy` | [sets, depth, width] uint32: counts of feature combinations, for `feature_paths` |
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetegen_rec.config.export import Backend, ScoringStrategy
from hetegen_rec.inference.feature_paths import FeaturePaths, counts_for
from hetegen_rec.inference.strategy import Rows, Strategy
from hetegen_rec.inference.uncertainty import Uncertainty
from hetegen_rec.scoring.backends import load_part
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.scoring.layout import Layout
from hetegen_rec.scoring.manifest import Artifact, StrategiesEntry

DIRECTORY = "strategies"
DROPPED = f"{DIRECTORY}/dropped.npy"
LOG_RATE = f"{DIRECTORY}/log_rate.npy"
COMBINATIONS = f"{DIRECTORY}/combinations.npy"

StrategyGraph: TypeAlias = Callable[[Tensor, list[Tensor]], Tensor]
"""ids [B, S] int64 and tables -> [B] float32 probabilities, as a plain graph gives them."""


class StrategyNetwork:
    """The network of an artifact, as strategies know it."""

    def __init__(self, artifact: Artifact, backend: Backend) -> None:
        """Loads its graph."""
        self._graph = load_part(artifact, backend, "logits")

    def score(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Tokens [B, T, D] and whether each exists, [B, T] bool -> click logits [B]."""
        logits: Tensor = self._graph(tokens, present)
        return logits


def load_strategy(artifact: Artifact, backend: Backend, name: ScoringStrategy) -> StrategyGraph:
    """A strategy other than `plain`.

    Raises:
        ArtifactError: the artifact does not have it.
    """
    entry, there = artifact.manifest.inference, artifact.manifest.strategies
    if name not in there or entry is None:
        raise ArtifactError(
            f"{artifact.root}: no strategy {name!r}; it has {', '.join(there)}. Export it with "
            f"`export.strategies=[plain,{name}]`"
        )
    strategy = _strategy(artifact, entry, StrategyNetwork(artifact, backend), name)
    tokens_of = load_part(artifact, backend, "tokens")
    rates = TokenRates(artifact)

    def probabilities(ids: Tensor, tables: list[Tensor]) -> Tensor:
        tokens = tokens_of(ids, tables)[0]
        rows = Rows(tokens, ids[:, rates.layout.first_slots], rates.of(ids))
        return strategy.score(rows).probabilities

    return probabilities


class TokenRates:
    """How often training looked the ids of each token up."""

    def __init__(self, artifact: Artifact) -> None:
        """Maps the rates into memory."""
        manifest = artifact.manifest
        self.layout = Layout(manifest.features)
        self._rates = np.load(artifact.path(LOG_RATE), mmap_mode="r", allow_pickle=False)
        starts, start = {}, 0
        for table, entry in manifest.vocabularies.items():
            starts[table] = start
            start += entry.num_ids
        self._starts = np.array([starts[table] for table in self.layout.tables])

    def of(self, ids: Tensor) -> Tensor:
        """[B, T] float32 of ids [B, S]: 0 where there is none; of a bag the mean over its values."""
        given = ids.numpy()
        found: NDArray[np.float32] = self._rates[np.maximum(given, 0) + self._starts]
        found = np.where(given >= 0, found, np.float32(0.0))
        for one in self.layout.fields:
            if one.is_bag:
                there = (given[:, one.start : one.stop] >= 0).sum(1)
                sums = found[:, one.start : one.stop].sum(1, dtype=np.float64)
                found[:, one.start] = sums / np.maximum(there, 1)
        return torch.from_numpy(found[:, self.layout.first_slots])


def _strategy(
    artifact: Artifact, entry: StrategiesEntry, network: StrategyNetwork, name: ScoringStrategy
) -> Strategy[Rows]:
    settings = entry.settings
    dropped = torch.from_numpy(np.load(artifact.path(DROPPED), allow_pickle=False))
    if name == "uncertainty":
        threshold = settings.uncertainty.threshold
        assert threshold is not None  # written with the one that was found
        return Uncertainty(network, entry, dropped, settings.uncertainty, settings.seed, threshold)
    schema = artifact.manifest.features
    counts = counts_for(schema, entry.num_rows, settings.feature_paths)
    counts.counters = np.load(artifact.path(COMBINATIONS), mmap_mode="r", allow_pickle=False)
    return FeaturePaths(network, counts, dropped, schema, settings.feature_paths, settings.seed)
