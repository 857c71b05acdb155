"""Masked feature prediction by noise-contrastive estimation (docs/method.md section 13).

Source: MAP, KDD 2023, arXiv 2308.01737, objective MFP.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from hetegen_rec.config.run import ModelConfig
from hetegen_rec.config.schema import NUM_RESERVED_IDS, Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.models.corruption import Corrupted, Masking, RowNoise, choose_share
from hetegen_rec.models.reconstruction import (
    Heads,
    MatchingHead,
    RowLosses,
    mean_over_targets,
    split_fields,
)


class ShareMasking(Masking):
    """Masks the same share of every row's cells."""

    def __init__(self, schema: Schema, dim: int, share: float) -> None:
        super().__init__(schema, dim, schema.field_names)
        self.share = share

    def forward(self, tokens: Tensor, batch: Batch, noise: RowNoise) -> Corrupted:
        """Masks clean tokens [B, T, D]."""
        masked = choose_share(noise.choices(), batch.ids >= 0, self.share)
        return Corrupted.without_level(
            self.masked(tokens, masked), is_target=masked & (batch.ids >= NUM_RESERVED_IDS)
        )


class NoiseContrast(MatchingHead, Heads):
    """Tells the value of a masked cell from values drawn from its field's training frequencies.

    The draws are the looked-up vectors of the same field in other rows of this rank's batch. A model
    `log p(x | row) = q . e_x + b_f + log p_f(x)`, which at first knows little but the frequencies, against K
    draws from p_f gives log odds of `q . e_x + b_f - log K` that x is the true value (Gutmann and Hyvarinen,
    AISTATS 2010): p_f cancels. A draw may equal the true value, as the estimate asks for. Products are not
    normalised: with a sharp temperature every draw would at first be told apart with false confidence.
    """

    def __init__(self, schema: Schema, statistics: Statistics, model: ModelConfig) -> None:
        full, sampled = split_fields(schema, statistics, model)
        super().__init__(schema, [*full, *sampled], model.dim)
        self.fields = self.names
        self.bias = nn.Parameter(torch.zeros(len(self.names)))
        self.num_negatives = model.objective.num_negatives

    def forward(
        self, hidden: Tensor, clean: Tensor, batch: Batch, corrupted: Corrupted, noise: RowNoise
    ) -> RowLosses:
        """Losses [B, F]; a cell that no other row has a known value for is no target."""
        picks = self.picked_tokens(batch, corrupted, noise)  # [B, F]
        query, keys = self.matched(hidden, clean, picks)  # [F, B, D]
        is_known = (batch.ids.gather(1, picks) >= NUM_RESERVED_IDS).T  # [F, B]
        drawn = drawn_rows(noise.is_padding, self.num_negatives)  # [N, K]
        usable = _of_draws(is_known, drawn) & ~_is_own(drawn, len(picks))  # [F, B, K]
        count = usable.sum(-1)  # [F, B]
        shift = self.bias[:, None] - count.clamp(min=1).float().log()
        positive = (query * keys).sum(-1) + shift
        negative = _products(query, keys, drawn) + shift[..., None]  # [F, B, K]
        against = torch.where(usable, functional.softplus(negative), 0.0).sum(-1)
        loss = (functional.softplus(-positive) + against).T  # [B, F]
        is_target = corrupted.is_target.gather(1, picks) & (count > 0).T
        chance = mean_over_targets(_loss_at_first(count), is_target.T)
        return RowLosses(torch.where(is_target, loss, 0.0), is_target, chance, chance)


def drawn_rows(is_padding: Tensor, number: int) -> Tensor:
    """[N, K]: for each block of K rows of a batch, the K real rows behind it, going round.

    Rows come shuffled, so these are draws. Every row serves K others, at the cost of K products a row.

    Args:
        is_padding: [B] bool.
        number: K.
    """
    real = is_padding.argsort(stable=True)  # the real rows first
    num_real = (~is_padding).sum().clamp(min=1)
    starts = torch.arange(number, len(is_padding) + number, number, device=is_padding.device)
    places = starts[:, None] + torch.arange(number, device=is_padding.device)
    return real[places % num_real]


def _of_draws(values: Tensor, drawn: Tensor) -> Tensor:
    """values [F, B] of every row's draws, [F, B, K]."""
    num_rows, number = values.shape[1], drawn.shape[1]
    return values[:, drawn].repeat_interleave(number, dim=1)[:, :num_rows]


def _is_own(drawn: Tensor, num_rows: int) -> Tensor:
    """[B, K] bool: draws that are the row itself."""
    rows = torch.arange(num_rows, device=drawn.device)
    return drawn.repeat_interleave(drawn.shape[1], dim=0)[:num_rows] == rows[:, None]


def _products(query: Tensor, keys: Tensor, drawn: Tensor) -> Tensor:
    """Products of every row's query [F, B, D] with the keys [F, B, D] of its draws, [F, B, K]."""
    num_rows, (num_blocks, number) = query.shape[1], drawn.shape
    filled = functional.pad(query, (0, 0, 0, num_blocks * number - num_rows))
    blocks = filled.view(len(query), num_blocks, number, -1)  # [F, N, K, D]
    return (blocks @ keys[:, drawn].mT).flatten(1, 2)[:, :num_rows]


def _loss_at_first(count: Tensor) -> Tensor:
    """Loss of a model that knows the frequencies alone, with odds of 1 : K for the true value; count: K."""
    number = count.clamp(min=1).float()
    return torch.log1p(number) + number * torch.log1p(1.0 / number)
