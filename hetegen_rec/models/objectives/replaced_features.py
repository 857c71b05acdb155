"""Replaced feature detection (docs/method.md section 13).

Source: MAP, KDD 2023, arXiv 2308.01737, objective RFD.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from hetegen_rec.config.schema import NUM_RESERVED_IDS, Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.models.corruption import Corrupted, Corruption, RowNoise, choose_share, other_rows
from hetegen_rec.models.reconstruction import Heads, RowLosses


class Replacement(Corruption):
    """Replaces the same share of every row's known cells by the values that other rows have there.

    Values come from known cells only: a missing or out-of-vocabulary value would give itself away, as
    originals that are so are never judged.
    """

    is_judged: Tensor

    def __init__(self, schema: Schema, names: list[str], share: float) -> None:
        """Args: names: of the fields that are judged, hence replaced."""
        super().__init__()
        self.share = share
        judged = [token.field in names for token in schema.tokens]
        self.register_buffer("is_judged", torch.tensor(judged), persistent=False)

    def forward(self, tokens: Tensor, batch: Batch, noise: RowNoise) -> Corrupted:
        """Replaces clean tokens [B, T, D]; all known cells are targets."""
        is_target = self.is_judged & (batch.ids >= NUM_RESERVED_IDS)
        replaced = choose_share(noise.choices(), is_target, self.share)
        seen = torch.where(replaced[..., None], other_rows(tokens, noise, given=is_target), tokens)
        return Corrupted.without_level(seen, is_target)


class ReplacementDetector(Heads):
    """Says of every known cell whether its value is the row's own: a logistic regression for each field.

    A cell that was replaced by an equal value is its own. The loss of a sequence is the mean over its items.
    """

    tokens: Tensor
    columns: Tensor

    def __init__(self, schema: Schema, names: list[str], dim: int, share: float) -> None:
        super().__init__()
        self.fields = names
        self.weight = nn.Parameter(torch.zeros(len(names), dim))
        self.bias = nn.Parameter(torch.zeros(len(names)))
        judged = [(i, names.index(t.field)) for i, t in enumerate(schema.tokens) if t.field in names]
        self.register_buffer("tokens", torch.tensor([i for i, _ in judged]), persistent=False)
        self.register_buffer("columns", torch.tensor([column for _, column in judged]), persistent=False)
        self._entropy = -share * math.log(share) - (1.0 - share) * math.log1p(-share)

    def forward(
        self,
        hidden: Tensor,
        clean: Tensor,
        batch: Batch,  # noqa: ARG002 - the rows' ids say nothing more than their vectors
        corrupted: Corrupted,
        noise: RowNoise,  # noqa: ARG002
    ) -> RowLosses:
        """Losses [B, F]; by chance log 2, and for one who knows the share its entropy."""
        is_replaced = (corrupted.tokens != clean).any(-1)[:, self.tokens]  # [B, C]
        logits = (hidden[:, self.tokens].float() * self.weight[self.columns]).sum(-1)
        logits = logits + self.bias[self.columns]
        loss = functional.binary_cross_entropy_with_logits(logits, is_replaced.float(), reduction="none")
        is_target = corrupted.is_target[:, self.tokens].float()
        count = self._over_tokens(is_target)
        mean = self._over_tokens(loss * is_target) / count.clamp(min=1.0)
        chance = torch.full_like(self.bias, math.log(2.0)).detach()
        return RowLosses(mean, count > 0, chance, torch.full_like(chance, self._entropy))

    def _over_tokens(self, values: Tensor) -> Tensor:
        """Sums values [B, C] of cells over the tokens of each field, [B, F]."""
        return values.new_zeros(len(values), len(self.fields)).index_add(1, self.columns, values)
