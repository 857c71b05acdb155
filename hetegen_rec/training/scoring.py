"""Scoring rows with a sharded model, exactly once each; measuring and writing the scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from hetegen_rec.config.data import Split
from hetegen_rec.config.run import RunConfig, Stage
from hetegen_rec.config.schema import NUM_RESERVED_IDS
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.reader import Reader
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.data.workers import staged
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.evaluation.gather import evaluate_predictions
from hetegen_rec.evaluation.predictions import Predictions
from hetegen_rec.evaluation.slices import head_threshold
from hetegen_rec.inference.building import TrainedModel, build_strategy
from hetegen_rec.inference.lookup import Lookup
from hetegen_rec.inference.scorer import StrategyScorer
from hetegen_rec.models.network import Outputs
from hetegen_rec.training.setup import ShardedModel, open_split


@torch.no_grad()
def score_rows(
    model: DistributedModelParallel,
    reader: Reader,
    runtime: Runtime,
    before_batch: Callable[[], None] = lambda: None,
) -> Predictions:
    """This rank's share of a split, scored. A collective: all ranks make equally many batches.

    Args:
        model: the sharded model.
        reader: of the rows.
        runtime: this process's view of the job.
        before_batch: called before each batch; what it raises on all ranks ends the scoring.
    """
    model.eval()

    def probabilities(batch: Batch) -> Tensor:
        outputs: Outputs = model(batch)[1]
        if outputs.logits is None:
            raise RuntimeError("the model scored nothing; it must be in eval mode")
        return outputs.logits.sigmoid()

    return _collect(reader, runtime, probabilities, before_batch)


def score_rows_by(scorer: StrategyScorer, reader: Reader, runtime: Runtime) -> Predictions:
    """This rank's share of a split, scored by a test-time strategy. A collective."""
    return _collect(reader, runtime, scorer.probabilities)


def open_scorer(
    config: RunConfig, stage: Stage, statistics: Statistics, model: ShardedModel, runtime: Runtime
) -> StrategyScorer | None:
    """The strategy of `inference.strategy` on the trained model of a stage; None for `plain`. A collective.

    Raises:
        ConfigError: the model cannot do it.
    """
    name = config.inference.strategy
    if name == "plain":
        return None
    lookup = Lookup(model.dmp.module.ebc, model.network, config.features)

    def open_rows(split: Split) -> Reader:
        return open_split(config, split, statistics, runtime, stage=stage)

    trained = TrainedModel(config, statistics, lookup, runtime, open_rows)
    return StrategyScorer(lookup, name, build_strategy(trained, name), runtime)


def _collect(
    reader: Reader,
    runtime: Runtime,
    probabilities: Callable[[Batch], Tensor],
    before_batch: Callable[[], None] = lambda: None,
) -> Predictions:
    predictions = Predictions()
    for batch in reader.epoch(Cursor()):
        before_batch()
        scores = probabilities(batch.to(runtime.device)).cpu()
        predictions.add(scores, batch.labels, batch.row_ids, batch.context)
    return predictions


def measure(
    predictions: Predictions,
    config: RunConfig,
    statistics: Statistics,
    runtime: Runtime,
    temperature: float | None = None,
) -> dict[str, Any]:
    """Metrics and slices over all ranks' rows, the same on every rank. A collective."""
    item = config.features.item
    threshold = None
    if item is not None:
        counts = statistics.fields[item].counts[NUM_RESERVED_IDS:]
        threshold = head_threshold(counts, config.evaluation.head_share)
    group = runtime.host_group if runtime.world_size > 1 else None
    return evaluate_predictions(predictions, group, config.evaluation, threshold, temperature)


def write_predictions(
    predictions: Predictions, directory: Path, runtime: Runtime, *, labelled: bool = True
) -> None:
    """Writes one Parquet file a rank: row_id, probability, label, and user_key where there is one.

    The directory appears whole, in place of an earlier one, or not at all. A collective.

    Args:
        predictions: this rank's share.
        directory: on a file system that all ranks share.
        runtime: this process's view of the job.
        labelled: whether the rows came with labels.
    """
    with staged(directory, runtime) as partial, runtime.together(f"writing {partial}"):
        rows = predictions.rows
        columns: dict[str, Any] = {
            "row_id": rows.row_ids,
            "probability": rows.probabilities.astype(np.float32),
        }
        if labelled:
            columns["label"] = rows.labels.astype(np.int8)
        if "user_key" in rows.context:
            columns["user_key"] = rows.context["user_key"]
        path = partial / f"part-{runtime.rank:05d}.parquet"
        pq.write_table(pa.table(columns), path, compression="zstd")
