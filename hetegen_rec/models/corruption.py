"""Discrete diffusion of a row: which cells are noised, and what the denoiser sees instead.

Works on looked-up rows, so that pre-training moves no more bytes between ranks than scoring does.
All randomness is a function of (noise seed, row, token): the same on every device and for every
number of ranks, and nothing has to be replayed after a restart. Source: DGenCTR, arXiv 2508.14500;
absorbing chain with a log-linear schedule as in MDLM, arXiv 2406.07524.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hetegen_rec.config.run import NoiseConfig
from hetegen_rec.config.schema import NUM_RESERVED_IDS, Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.hashing import uniform, uniform_torch

LABEL_MASK_ID = 2
_STREAMS_PER_TOKEN = 4
_MASK, _KIND, _SHUFFLE, _PICK = range(_STREAMS_PER_TOKEN)


@dataclass
class Corrupted:
    """A noised batch."""

    tokens: Tensor
    """[B, T, D]: clean rows, [MASK] vectors, or rows of other examples."""
    is_target: Tensor
    """[B, T] bool: cells to reconstruct: noised, and neither padding, missing nor OOV (a bag goes by
    its first value)."""
    label_ids: Tensor
    """[B] int64: 0, 1, or 2 where the label is masked."""
    noise_level: Tensor
    """[B] float: t."""


class RowNoise:
    """Uniform numbers in [0, 1) addressed by row and token."""

    def __init__(self, batch: Batch, num_tokens: int) -> None:
        self._seed = batch.noise_seed
        self._offset = uniform_of_batch(batch)
        self._strata = batch.strata
        self._rows = batch.row_ids
        self.is_padding = batch.row_ids < 0  # [B]
        self._stride = (num_tokens + 1) * _STREAMS_PER_TOKEN
        self._num_tokens = num_tokens

    def cells(self, stream: int) -> Tensor:
        """[B, T + 1]: one number per token, the last for the label."""
        columns = torch.arange(self._num_tokens + 1, device=self._rows.device) * _STREAMS_PER_TOKEN
        return uniform_torch(self._rows[:, None] * self._stride + columns + stream, self._seed)

    def picks(self) -> Tensor:
        """[B, T]: numbers for choosing among the positions of a sequence."""
        return self.cells(_PICK)[:, :-1]

    def levels(self, t_min: float) -> Tensor:
        """[B]: t ~ U(t_min, 1), stratified over the global batch."""
        return t_min + (1.0 - t_min) * torch.frac(self._strata + self._offset)


def uniform_of_batch(batch: Batch) -> float:
    """One uniform number per step, the same on every rank."""
    step = np.array([batch.cursor.rows_per_lane], dtype=np.int64)
    return float(uniform(step, batch.noise_seed)[0])


class Corruption(nn.Module):
    """The forward process; owns the [MASK] vector of every field."""

    field_of_token: Tensor
    may_swap: Tensor

    def __init__(self, schema: Schema, config: NoiseConfig, dim: int, swappable: list[str]) -> None:
        """Args: swappable: fields that `marginal` noise may fill from other rows."""
        super().__init__()
        self.config = config
        names = list(schema.field_names)
        self.mask_vectors = nn.Parameter(torch.randn(len(names), dim) * 0.02)
        field_of_token = [names.index(token.field) for token in schema.tokens]
        swaps = [token.field in swappable for token in schema.tokens]
        self.register_buffer("field_of_token", torch.tensor(field_of_token), persistent=False)
        self.register_buffer("may_swap", torch.tensor(swaps), persistent=False)
        self._sequences = [schema.span(field.name) for field in schema.fields if field.kind == "sequence"]

    def forward(self, tokens: Tensor, batch: Batch, noise: RowNoise) -> Corrupted:
        """Noises clean tokens [B, T, D]."""
        level = noise.levels(self.config.t_min)  # [B]
        draws = noise.cells(_MASK)  # [B, T + 1]
        hit = draws < level[:, None]
        noised = self._with_whole_sequences(hit[:, :-1], noise) & (batch.ids >= 0)
        masked = self.mask_vectors[self.field_of_token].expand_as(tokens)
        if self.config.kind == "marginal":
            masked = torch.where(self._swapped(noise)[..., None], _other_rows(tokens, noise), masked)
        clean_labels = batch.labels.long()
        label_hit = hit[:, -1] if self.config.label_in_set else torch.ones_like(hit[:, -1])
        return Corrupted(
            tokens=torch.where(noised[..., None], masked.to(tokens.dtype), tokens),
            is_target=noised & (batch.ids >= NUM_RESERVED_IDS),
            label_ids=torch.where(label_hit, LABEL_MASK_ID, clean_labels),
            noise_level=level,
        )

    def _with_whole_sequences(self, hit: Tensor, noise: RowNoise) -> Tensor:
        """Now and then masks a sequence as a whole, so that it is learnt from its context."""
        draws = noise.cells(_KIND)
        for start, stop in self._sequences:
            whole = draws[:, start : start + 1] < self.config.whole_sequence  # [B, 1]
            hit = torch.cat([hit[:, :start], hit[:, start:stop] | whole, hit[:, stop:]], dim=1)
        return hit

    def _swapped(self, noise: RowNoise) -> Tensor:
        return (noise.cells(_KIND)[:, :-1] < self.config.marginal_fraction) & self.may_swap


def _other_rows(tokens: Tensor, noise: RowNoise) -> Tensor:
    """Every column of the real rows permuted on its own: a draw from the field's marginal distribution."""
    draws = noise.cells(_SHUFFLE)[:, :-1] + noise.is_padding[:, None]
    order = draws.argsort(dim=0)  # [B, T], real rows first
    place = (~noise.is_padding).cumsum(0) - 1  # of each real row among them
    order = order[place.clamp(min=0)]
    return tokens.gather(0, order[..., None].expand_as(tokens))
