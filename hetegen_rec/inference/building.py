"""From the section `inference` of a configuration to a strategy that fits a trained model."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hetegen_rec.config.data import Split
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.inference import InferenceStrategy
from hetegen_rec.config.run import RunConfig
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.reader import Reader
from hetegen_rec.data.sketch import CombinationCounts
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.inference.feature_paths import FeaturePaths, counts_for
from hetegen_rec.inference.lookup import BatchRows, Lookup
from hetegen_rec.inference.regeneration import Regenerator, look_up_candidates
from hetegen_rec.inference.strategy import Strategy
from hetegen_rec.inference.symmetric import Symmetric
from hetegen_rec.inference.uncertainty import Uncertainty, threshold_of
from hetegen_rec.models.hetegen import HeteGenNetwork
from hetegen_rec.models.reconstruction import Reconstruction

logger = logging.getLogger(__name__)

SKETCH_FILE = "combinations.npz"
"""In `data.prepared_dir`: the counts of feature combinations."""


@dataclass(frozen=True)
class TrainedModel:
    """What strategies are built from."""

    config: RunConfig
    statistics: Statistics
    lookup: Lookup
    runtime: Runtime
    open_split: Callable[[Split], Reader]
    """Opens a split to read every row once."""


def build_strategy(model: TrainedModel, name: InferenceStrategy) -> Strategy[BatchRows]:
    """Builds a strategy with its settings of the section `inference`. A collective.

    Args:
        model: that will score by it.
        name: of the strategy, another than `plain`.

    Raises:
        ConfigError: the model cannot do it; the message says what to do.
    """
    builders: dict[str, Callable[[TrainedModel], Strategy[BatchRows]]] = {
        "symmetric": _symmetric,
        "feature_paths": _feature_paths,
        "uncertainty": _uncertainty,
    }
    return builders[name](model)


def _symmetric(model: TrainedModel) -> Symmetric:
    network, config = model.lookup.network, model.config
    if (
        not isinstance(network, HeteGenNetwork)
        or network.denoiser_masks is None
        or not isinstance(network.reconstruction, Reconstruction)
    ):
        raise ConfigError(
            "inference.strategy: symmetric regenerates cells, which this model has not learnt; evaluate a "
            "`joint` or `finetune` stage of `model.objective.name: diffusion`, or choose another strategy"
        )
    settings = config.inference.symmetric
    candidates = look_up_candidates(
        model.lookup,
        config.features,
        model.statistics,
        network.reconstruction,
        settings.candidates,
        model.runtime.device,
    )
    regenerator = Regenerator(network.reconstruction, candidates)
    return Symmetric(network, regenerator, config.features, settings, config.inference.seed)


def _feature_paths(model: TrainedModel) -> FeaturePaths:
    inference = model.config.inference
    dropped = _dropped(model)  # refused before a pass over the training rows
    counts = count_combinations(model)
    if model.runtime.is_main and counts.overestimate > inference.feature_paths.reliable_count:
        logger.warning(
            "inference.feature_paths.sketch_mb: %d is so little that counts are %.0f too high in the mean, "
            "so few combinations look rare; raise it, or lower `combinations`",
            inference.feature_paths.sketch_mb,
            counts.overestimate,
        )
    return FeaturePaths(
        model.lookup.network,
        counts,
        dropped,
        model.config.features,
        inference.feature_paths,
        inference.seed,
    )


def _uncertainty(model: TrainedModel) -> Uncertainty:
    inference = model.config.inference
    settings = inference.uncertainty
    strategy = Uncertainty(model.lookup.network, model.statistics, _dropped(model), settings, inference.seed)
    if settings.threshold is not None:
        strategy.threshold = settings.threshold
    else:
        strategy.threshold = threshold_of(_uncertainties(model, strategy), settings)
        logger.info("rows of an uncertainty above %.4f get %d paths", strategy.threshold, settings.paths)
    return strategy


def _uncertainties(model: TrainedModel, strategy: Uncertainty) -> NDArray[np.float32]:
    """[N]: of all validation rows, on every rank. A collective."""
    lookup, runtime = model.lookup, model.runtime
    parts = [np.empty(0, np.float32)]
    for batch in model.open_split("valid").epoch(Cursor()):
        here = batch.to(runtime.device)
        with lookup.scoring(runtime.device.type):
            found = strategy.first_pass(BatchRows.of(lookup.tokens(here.kjt), here)).uncertainty
        parts.append(found[here.row_ids >= 0].cpu().numpy())
    of_all: NDArray[np.float32] = np.concatenate(runtime.gather(np.concatenate(parts)))
    return of_all


def _dropped(model: TrainedModel) -> Tensor:
    """[T, D]: what stands for a dropped token. A collective."""
    if model.config.inference.dropped == "out_of_vocabulary":
        return model.lookup.unknown_tokens(model.runtime.device)
    masks = model.lookup.network.mask_tokens
    if masks is None:
        raise ConfigError(
            "inference.dropped: mask puts [MASK] vectors in the place of cells, which this model has not "
            "learnt; set it to `out_of_vocabulary` (best trained with `oov_dropout`)"
        )
    return masks.detach()


def count_combinations(model: TrainedModel) -> CombinationCounts:
    """The counts of the training rows: stored ones, or counted now and stored. A collective."""
    settings, runtime = model.config.inference.feature_paths, model.runtime
    counts = counts_for(model.config.features, model.statistics.num_rows, settings)
    path = Path(model.config.data.prepared_dir) / SKETCH_FILE
    fingerprint = model.statistics.fingerprint
    # One rank that has to count makes all of them count.
    if all(runtime.gather(counts.load(path, fingerprint))):
        return counts
    logger.info("counting the feature combinations of the training rows, once")
    counts.counters[:] = 0
    with runtime.together("counting feature combinations"):
        for batch in model.open_split("train").epoch(Cursor()):
            counts.add(batch.ids[batch.row_ids >= 0].numpy())
    if runtime.world_size > 1:
        # Addition is the same for the signed numbers of the same bits, which gloo knows.
        dist.all_reduce(torch.from_numpy(counts.counters.view(np.int32)), group=runtime.host_group)
    if runtime.is_main:
        _store(counts, path, fingerprint)
    return counts


def _store(counts: CombinationCounts, path: Path, fingerprint: str) -> None:
    """Prepared data may be for reading only."""
    try:
        counts.save(path, fingerprint)
    except OSError as error:
        logger.warning("%s cannot be written, so combinations are counted every time: %s", path, error)
