"""Test-time strategies of an artifact: built as evaluation builds them, and stored."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from hetegen_rec.config.export import ScoringStrategy
from hetegen_rec.config.inference import InferenceConfig, UncertaintyConfig
from hetegen_rec.config.run import RunConfig
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.inference.building import TrainedModel, build_strategy
from hetegen_rec.inference.feature_paths import FeaturePaths
from hetegen_rec.inference.uncertainty import Uncertainty
from hetegen_rec.scoring.manifest import StrategiesEntry
from hetegen_rec.scoring.strategies import COMBINATIONS, DIRECTORY, DROPPED, LOG_RATE

Exported: TypeAlias = FeaturePaths | Uncertainty
"""What can be stored: strategies that need nothing of a row but its tokens and their ids."""


def build_strategies(model: TrainedModel) -> dict[ScoringStrategy, Exported]:
    """The strategies of `export.strategies` besides `plain`, on the training side.

    Raises:
        ConfigError: the model cannot do one.
    """
    found: dict[ScoringStrategy, Exported] = {}
    for name in model.config.export.strategies:
        if name != "plain":
            strategy = build_strategy(model, name)
            assert isinstance(strategy, Exported)
            found[name] = strategy
    return found


def needs_validation_rows(config: RunConfig) -> bool:
    """Whether a strategy that is exported looks at all validation rows, to find its threshold."""
    return "uncertainty" in config.export.strategies and config.inference.uncertainty.threshold is None


def write_strategies(
    root: Path,
    strategies: Mapping[ScoringStrategy, Exported],
    statistics: Statistics,
    tables: Sequence[str],
    settings: InferenceConfig,
    oov_dropout: float,
) -> StrategiesEntry | None:
    """Writes what the strategies know.

    Args:
        root: directory of the artifact.
        strategies: from `build_strategies`.
        statistics: of the training rows.
        tables: in the order of the manifest's vocabularies.
        settings: section `inference` of the run.
        oov_dropout: that the model was trained under.

    Returns:
        Their entry of the manifest; None if there are none.
    """
    if not strategies:
        return None
    (root / DIRECTORY).mkdir()
    files = [DROPPED, LOG_RATE]
    rates = [statistics.log_rate(table, oov_dropout) for table in tables]
    np.save(root / LOG_RATE, np.concatenate(rates))
    for strategy in strategies.values():
        np.save(root / DROPPED, strategy.dropped.float().numpy())
        if isinstance(strategy, FeaturePaths):
            np.save(root / COMBINATIONS, strategy.counts.counters)
            files.append(COMBINATIONS)
        else:
            settings = _with_threshold(settings, strategy.threshold)
    return StrategiesEntry(
        settings=settings,
        num_rows=statistics.num_rows,
        num_positives=statistics.num_positives,
        files=files,
    )


def _with_threshold(settings: InferenceConfig, threshold: float) -> InferenceConfig:
    """The settings with the threshold that was found in the place of the budget."""
    budget = UncertaintyConfig.model_fields["budget"].default
    uncertainty = settings.uncertainty.model_copy(update={"threshold": threshold, "budget": budget})
    return settings.model_copy(update={"uncertainty": uncertainty})
