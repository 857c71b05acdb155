"""Regenerates implausible cells before a row is scored.

Reported for SGCTR (arXiv 2511.14403): the generator also runs at inference, where it iteratively re-weights
or regenerates noisy features. Everything below that is derived (docs/method.md section 11).
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hetegen_rec.config.inference import SymmetricConfig
from hetegen_rec.config.schema import NUM_RESERVED_IDS, Schema
from hetegen_rec.data.hashing import salt_of, uniform
from hetegen_rec.inference.lookup import BatchRows
from hetegen_rec.inference.regeneration import Regenerator
from hetegen_rec.inference.strategy import Scored, every_row
from hetegen_rec.models.hetegen import HeteGenNetwork


class Symmetric:
    """Every cell is judged in the light of the others, and the least plausible ones are blended.

    A cell is taken to be noise, a draw from its field's marginal, with prior probability `noise_share`. The
    odds that it is not are `(1 - share) / share * p(x | rest) / p(x)`. Where their logarithm is below zero,
    and below half of the lowest of the row, as one wrong cell makes others look wrong, the excess is the log
    weight of the looked-up row in a blend with the regenerated one. So a score is continuous in the odds, and
    a row of plausible cells stays as it is. A later round judges the looked-up cells anew, in the light of
    what was repaired. Cells without a value of their own, missing or out of vocabulary, are not judged.
    """

    def __init__(
        self,
        network: HeteGenNetwork,
        regenerator: Regenerator,
        schema: Schema,
        config: SymmetricConfig,
        seed: int,
    ) -> None:
        """Args: seed: of the cut of the fields into folds."""
        self._network, self._regenerator = network, regenerator
        self._prior_log_odds = math.log1p(-config.noise_share) - math.log(config.noise_share)
        self._fields = [token.field for token in schema.tokens]
        num_folds = min(config.folds, len(schema.fields))
        self._rounds = [_folds(schema, num_folds, seed, turn) for turn in range(config.rounds)]
        self._passes = 1.0 + num_folds * config.rounds

    @property
    def settings(self) -> Mapping[str, float]:
        """How often every cell is judged."""
        return {"rounds": len(self._rounds)}

    def score(self, rows: BatchRows) -> Scored:
        """Repairs the rows, round after round, and scores what comes out."""
        tokens = rows.tokens
        for folds in self._rounds:
            log_odds, expected = self._judge(tokens, folds, rows)
            worst = log_odds.min(1, keepdim=True).values
            weight = (log_odds - 0.5 * worst.clamp(max=0.0)).clamp(max=0.0).exp()[..., None]  # [B, T, 1]
            blend = weight * rows.tokens + (1.0 - weight) * expected
            tokens = torch.where(weight < 1.0, blend, rows.tokens)
        logits = self._network.score(tokens, rows.present)
        return Scored(logits.sigmoid(), every_row(rows, self._passes))

    def _judge(self, tokens: Tensor, folds: list[list[int]], rows: BatchRows) -> tuple[Tensor, Tensor]:
        """How plausible each looked-up cell is beside `tokens` [B, T, D], and what it should be.

        Returns:
            [B, T] log odds, infinite for cells that are not judged; and [B, T, D].
        """
        log_odds = torch.full(rows.present.shape, math.inf, device=tokens.device)
        expected = tokens.clone()
        for fold in folds:
            hidden = self._denoise_without(tokens, fold, rows)
            for place in fold:
                field = self._fields[place]
                if field in self._regenerator.fields:
                    found = self._regenerator.judge(field, place, hidden, rows)
                    log_odds[:, place] = found.lift + self._prior_log_odds
                    expected[:, place] = found.expected.to(tokens.dtype)
        return log_odds.masked_fill(rows.ids < NUM_RESERVED_IDS, math.inf), expected

    def _denoise_without(self, tokens: Tensor, fold: list[int], rows: BatchRows) -> Tensor:
        """[B, T + 1, D]: what the denoiser says of rows in which the fold is masked."""
        masks = self._network.denoiser_masks
        assert masks is not None
        present = rows.present
        hidden_cells = torch.zeros_like(present)
        hidden_cells[:, fold] = present[:, fold]
        masked = torch.where(hidden_cells[..., None], masks.to(tokens.dtype), tokens)
        level = hidden_cells.sum(1) / present.sum(1).clamp(min=1)
        return self._network.denoise(masked, present, level)


def _folds(schema: Schema, num_folds: int, seed: int, turn: int) -> list[list[int]]:
    """The tokens of each fold: fields are dealt out anew in each round, with all tokens of one together."""
    order = np.argsort(uniform(np.arange(len(schema.fields)), salt_of(f"inference/folds/{seed}/{turn}")))
    fold_of = {schema.field_names[field]: place % num_folds for place, field in enumerate(order)}
    return [
        [place for place, token in enumerate(schema.tokens) if fold_of[token.field] == fold]
        for fold in range(num_folds)
    ]
