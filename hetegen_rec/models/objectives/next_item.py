"""Which item was clicked, given the rest of its row (docs/method.md section 13).

Source: GenCTR, arXiv 2507.11246 (reported: generative pre-training for next-item prediction with the given
item category, then fine-tuning within a discriminative framework).
"""

import torch
from torch import Tensor

from hetegen_rec.config.schema import NUM_RESERVED_IDS, Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.models.corruption import Corrupted, Masking, RowNoise


class ItemMasking(Masking):
    """Masks the item of every clicked row, with the fields that would give it away.

    User, context, history and what is given of the item stay as they are. Rows without a click are left
    alone and predict nothing: the next item is one that was clicked.
    """

    is_masked: Tensor

    def __init__(self, schema: Schema, dim: int, names: list[str]) -> None:
        """Args: names: the item's field and those that would give it away."""
        super().__init__(schema, dim, names)
        masked = [token.field in names for token in schema.tokens]
        self.register_buffer("is_masked", torch.tensor(masked), persistent=False)

    def forward(self, tokens: Tensor, batch: Batch, noise: RowNoise) -> Corrupted:  # noqa: ARG002 - no chance
        """Masks clean tokens [B, T, D]."""
        is_clicked = batch.labels[:, None] == 1
        masked = is_clicked & self.is_masked & (batch.ids >= 0)
        return Corrupted.without_level(
            self.masked(tokens, masked), is_target=masked & (batch.ids >= NUM_RESERVED_IDS)
        )
