"""Held-out reconstruction: how well a generative stage predicts noised cells of rows it did not train on."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hetegen_rec.config.schema import Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.reader import Reader
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.evaluation.results import FieldReconstruction, LevelReconstruction
from hetegen_rec.inference.lookup import Lookup
from hetegen_rec.models.difficulty import relative_loss
from hetegen_rec.models.hetegen import HeteGenNetwork
from hetegen_rec.models.reconstruction import Heads, Reconstruction, RowLosses
from hetegen_rec.models.reduction import sum_over_ranks
from hetegen_rec.training.setup import ShardedModel

NUM_LEVELS = 4
"""Equal bins of the noise level t that results are given for."""
_NOISE_SEED = 20_260_101
_GOLDEN_RATIO = (5.0**0.5 - 1.0) / 2.0
_COUNT, _LOSS, _CHANCE, _BASELINE, _TOP_1, _TOP_10 = range(6)


@torch.no_grad()
def measure_reconstruction(
    model: ShardedModel, reader: Reader, schema: Schema, runtime: Runtime
) -> dict[str, FieldReconstruction]:
    """Results of every reconstructed field, the same on every rank. A collective.

    The noise of a row depends on the row alone, so results compare between stages, runs and numbers of ranks.
    An in-batch softmax, though, chooses among its rank's part of an evaluation batch: its figures depend on
    `train.eval_batch_size` and on the number of ranks.

    Args:
        model: of a generative stage; left in eval mode.
        reader: of the rows, each once.
        schema: the fields.
        runtime: this process's view of the job.
    """
    network = model.network
    if not isinstance(network, HeteGenNetwork):
        raise TypeError("only the generative model reconstructs rows")
    lookup = Lookup(model.dmp.module.ebc, network, schema)
    sums = torch.zeros(len(network.fields), NUM_LEVELS, 6, dtype=torch.float64, device=runtime.device)
    for read in reader.epoch(Cursor()):
        batch = with_fixed_noise(read.to(runtime.device))
        with lookup.scoring(runtime.device.type):
            tokens = lookup.tokens(batch.kjt)
            _, corrupted, rows = network.reconstruct(tokens, batch.ids >= 0, batch)
        sums += _sums(rows, corrupted.noise_level)
    total = sum_over_ranks(sums).cpu()
    has_levels = network.config.objective.knows_noise_levels
    return {
        name: _result(one, _chosen_among(network.reconstruction, name), has_levels=has_levels)
        for name, one in zip(network.fields, total, strict=True)
    }


def with_fixed_noise(batch: Batch) -> Batch:
    """The batch with noise that depends on row ids alone, its levels spread evenly over any run of rows."""
    place = np.modf(batch.row_ids.clamp(min=0).cpu().numpy() * _GOLDEN_RATIO)[0]
    strata = torch.from_numpy(place.astype(np.float32)).to(batch.strata.device)
    # A cursor tells the steps of an epoch apart; here a row is in the same step whoever reads it.
    return replace(batch, noise_seed=_NOISE_SEED, strata=strata, cursor=Cursor())


def _sums(rows: RowLosses, noise_level: Tensor) -> Tensor:
    """[F, levels, 6]: sums over the targets of a batch."""
    level = (noise_level * NUM_LEVELS).long().clamp(max=NUM_LEVELS - 1)
    bins = functional.one_hot(level, NUM_LEVELS).double()  # [B, levels]
    targets = rows.is_target.double()  # [B, F]
    rank = torch.full_like(rows.loss, torch.inf) if rows.rank is None else rows.rank
    values = {
        _COUNT: torch.ones_like(targets),
        _LOSS: rows.loss.double(),
        _CHANCE: rows.chance.double().expand_as(targets),
        _BASELINE: rows.baseline.double().expand_as(targets),
        _TOP_1: (rank < 1).double(),
        _TOP_10: (rank < 10).double(),
    }
    stacked = torch.stack([values[key] for key in sorted(values)], dim=-1)  # [B, F, 6]
    return torch.einsum("bk,bf,bfs->fks", bins, targets, stacked)


def _result(sums: Tensor, among: str | None, *, has_levels: bool) -> FieldReconstruction:
    """Means of one field from its sums [levels, 6]."""
    total = sums.sum(0)
    mean = (total / total[_COUNT].clamp(min=1.0)).tolist()
    levels = [_level(index, one) for index, one in enumerate(sums)] if has_levels else []
    is_known = bool(total[_COUNT] > 0)
    return {
        "targets": int(total[_COUNT]),
        "among": among,
        "cross_entropy": mean[_LOSS] if is_known else None,
        "chance": mean[_CHANCE] if is_known else None,
        "baseline": mean[_BASELINE] if is_known else None,
        "relative": relative_loss(mean[_LOSS], mean[_CHANCE]) if is_known else None,
        "top_1": mean[_TOP_1] if is_known and among is not None else None,
        "top_10": mean[_TOP_10] if is_known and among is not None else None,
        "levels": levels,
    }


def _level(index: int, sums: Tensor) -> LevelReconstruction:
    count = int(sums[_COUNT])
    return {
        "from": index / NUM_LEVELS,
        "to": (index + 1) / NUM_LEVELS,
        "targets": count,
        "cross_entropy": float(sums[_LOSS]) / count if count else None,
    }


def _chosen_among(heads: Heads, name: str) -> str | None:
    """What the head of a field chooses from; None if it does not choose."""
    if not isinstance(heads, Reconstruction):
        return None
    return "vocabulary" if name in heads.full_fields else "candidates"
