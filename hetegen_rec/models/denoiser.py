"""The transformer that sees a (corrupted) row and says, token by token, what it should have been."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hetegen_rec.config.run import DenoiserConfig
from hetegen_rec.models.attention import Guidance, GuidedAttention
from hetegen_rec.models.corruption import LABEL_MASK_ID

_TIME_FREQUENCIES = 16


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, dim: int, config: DenoiserConfig) -> None:
        super().__init__()
        hidden = dim * config.feedforward_multiplier
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = GuidedAttention(dim, config.attention, config.dropout)
        self.feedforward_norm = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, hidden)
        self.narrow = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, guidance: Guidance, padding: Tensor | None) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        x = x + self.attention(self.attention_norm(x), guidance, padding)
        hidden = functional.gelu(self.widen(self.feedforward_norm(x)))
        return x + self.dropout(self.narrow(hidden))


class Denoiser(nn.Module):
    """Tokens and label of a row -> one hidden vector each.

    Every token gets an embedding of its place (field and position in a sequence) and one of the
    noise level; the label is the last element of the set.
    """

    def __init__(self, num_tokens: int, dim: int, config: DenoiserConfig) -> None:
        super().__init__()
        self.label_embedding = nn.Embedding(LABEL_MASK_ID + 1, dim)
        self.place_embedding = nn.Parameter(torch.randn(num_tokens + 1, dim) * 0.02)
        self.time_embedding = nn.Sequential(
            nn.Linear(2 * _TIME_FREQUENCIES, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        self.blocks = nn.ModuleList(Block(dim, config) for _ in range(config.num_layers))
        self.output_norm = nn.LayerNorm(dim)
        nn.init.normal_(self.label_embedding.weight, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        label_ids: Tensor,
        noise_level: Tensor,
        guidance: Guidance,
        padding: Tensor | None,
    ) -> Tensor:
        """Runs the denoiser.

        Args:
            tokens: [B, T, D].
            label_ids: [B], 0, 1 or masked (2).
            noise_level: [B], t in [0, 1]; 0 for a clean row.
            guidance: gains and biases over the T + 1 elements.
            padding: [B, T + 1] bool, elements that do not exist; None if all do.

        Returns:
            [B, T + 1, D]; the last element is the label's.
        """
        label = self.label_embedding(label_ids)[:, None]
        x = torch.cat([tokens, label.to(tokens.dtype)], dim=1)
        x = x + self.place_embedding + self.time_embedding(_waves(noise_level).to(x.dtype))[:, None]
        for block in self.blocks:
            x = block(x, guidance, padding)
        return self.output_norm(x)

    @property
    def shared_weight(self) -> Tensor:
        """The last weight that all fields share, on which their gradients are compared."""
        if not self.blocks:
            return self.output_norm.weight
        last = cast(Block, self.blocks[-1])
        return last.narrow.weight


def _waves(t: Tensor) -> Tensor:
    """Sines and cosines of t [B] -> [B, 2 * frequencies]."""
    powers = torch.arange(_TIME_FREQUENCIES, device=t.device, dtype=t.dtype)
    angles = t[:, None] * math.pi * torch.pow(1.5, powers)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
