"""Corruption of a row: which cells the denoiser does not see as they are, and what it sees instead.

Works on looked-up rows, so that pre-training moves no more bytes between ranks than scoring does.
All randomness is a function of (noise seed, row, token): the same on every device and for every
number of ranks, and nothing has to be replayed after a restart. Here is the discrete diffusion of
DGenCTR (arXiv 2508.14500), an absorbing chain with a log-linear schedule as in MDLM (arXiv
2406.07524); other objectives corrupt rows in their own way.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
    """[B, T] bool: cells that something is to be said of, as a rule to reconstruct: noised, and neither
    padding, missing nor OOV (a bag goes by its first value)."""
    label_ids: Tensor
    """[B] int64: 0, 1, or 2 where the label is masked."""
    noise_level: Tensor
    """[B] float: t."""

    @classmethod
    def without_level(cls, tokens: Tensor, is_target: Tensor) -> "Corrupted":
        """Of objectives without noise levels and label: t is 0 and the label masked, as when rows are scored.

        Args:
            tokens: [B, T, D].
            is_target: [B, T] bool.
        """
        size, device = tokens.shape[:1], tokens.device
        return cls(
            tokens,
            is_target,
            label_ids=torch.full(size, LABEL_MASK_ID, device=device),
            noise_level=torch.zeros(size, device=device),
        )


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

    def choices(self) -> Tensor:
        """[B, T]: numbers for choosing the cells to corrupt."""
        return self.cells(_MASK)[:, :-1]

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


class Corruption(nn.Module, ABC):
    """What an objective does to the looked-up rows of a batch before the denoiser sees them."""

    @abstractmethod
    def forward(self, tokens: Tensor, batch: Batch, noise: RowNoise) -> Corrupted:
        """Corrupts clean tokens [B, T, D]."""

    @property
    def mask_tokens(self) -> Tensor | None:
        """[T, D]: the [MASK] vector of every token; None if not all tokens are masked now and then."""
        return None


class Masking(Corruption):
    """Owns a [MASK] vector of every field that it masks."""

    field_of_token: Tensor

    def __init__(self, schema: Schema, dim: int, names: Sequence[str]) -> None:
        """Args: names: of the fields that are masked."""
        super().__init__()
        self.mask_vectors = nn.Parameter(torch.randn(len(names), dim) * 0.02)
        field_of_token = [names.index(t.field) if t.field in names else -1 for t in schema.tokens]
        self.register_buffer("field_of_token", torch.tensor(field_of_token), persistent=False)
        self._masks_all = set(names) == set(schema.field_names)

    @property
    def mask_tokens(self) -> Tensor | None:
        """[T, D]; None unless all fields are masked now and then."""
        return self.mask_vectors[self.field_of_token] if self._masks_all else None

    def masked(self, tokens: Tensor, where: Tensor) -> Tensor:
        """Tokens [B, T, D] with [MASK] vectors where [B, T] says so, in fields that are masked."""
        masks = self.mask_vectors[self.field_of_token].to(tokens.dtype)
        return torch.where(where[..., None], masks, tokens)


class Diffusion(Masking):
    """The forward process of the diffusion."""

    may_swap: Tensor

    def __init__(self, schema: Schema, config: NoiseConfig, dim: int, swappable: list[str]) -> None:
        """Args: swappable: fields that `marginal` noise may fill from other rows."""
        super().__init__(schema, dim, schema.field_names)
        self.config = config
        swaps = [token.field in swappable for token in schema.tokens]
        self.register_buffer("may_swap", torch.tensor(swaps), persistent=False)
        self.lacks_swaps = config.kind == "marginal" and not any(swaps)
        self._sequences = [schema.span(field.name) for field in schema.fields if field.kind == "sequence"]

    def forward(self, tokens: Tensor, batch: Batch, noise: RowNoise) -> Corrupted:
        """Noises clean tokens [B, T, D]."""
        level = noise.levels(self.config.t_min)  # [B]
        draws = noise.cells(_MASK)  # [B, T + 1]
        hit = draws < level[:, None]
        noised = self._with_whole_sequences(hit[:, :-1], noise) & (batch.ids >= 0)
        seen = self.masked(tokens, noised)
        if self.config.kind == "marginal":
            swapped = noised & self._swapped(noise)
            others = other_rows(tokens, noise, ~noise.is_padding[:, None].expand_as(swapped))
            seen = torch.where(swapped[..., None], others, seen)
        clean_labels = batch.labels.long()
        label_hit = hit[:, -1] if self.config.label_in_set else torch.ones_like(hit[:, -1])
        return Corrupted(
            tokens=seen,
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


def other_rows(tokens: Tensor, noise: RowNoise, given: Tensor) -> Tensor:
    """Every column permuted on its own among some of its rows: a draw from the field's marginal distribution.

    Args:
        tokens: [B, T, D].
        noise: of the batch.
        given: [B, T] bool, the cells that give their values; what the others get has no meaning.
    """
    draws = noise.cells(_SHUFFLE)[:, :-1] + (~given).float()
    order = draws.argsort(dim=0)  # [B, T], those that give first
    place = given.cumsum(0) - 1  # of each of them among them
    source = order.gather(0, place.clamp(min=0))
    return tokens.gather(0, source[..., None].expand_as(tokens))


def choose_share(draws: Tensor, eligible: Tensor, share: float) -> Tensor:
    """[B, T] bool: the given share of every row's eligible cells, rounded, but at least one if it has any.

    Args:
        draws: [B, T], uniform numbers in [0, 1).
        eligible: [B, T] bool.
        share: in (0, 1).
    """
    count = (eligible.sum(1, keepdim=True) * share).round().clamp(min=1.0)
    place = (draws + (~eligible).float()).argsort(dim=1, stable=True).argsort(dim=1)
    return (place < count) & eligible
