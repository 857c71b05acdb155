"""MaskNet: features multiplied by masks that depend on the row."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from hetegen_rec.config.backbone import BackboneConfig
from hetegen_rec.models.backbones.layers import Deep


class MaskNet(nn.Module):
    """Mask blocks side by side, and hidden layers on what they put out (arXiv 2102.07619, section 3.4)."""

    def __init__(self, num_fields: int, dim: int, config: BackboneConfig) -> None:
        super().__init__()
        self.norm = FieldNorm(num_fields, dim)
        width = num_fields * dim
        self.blocks = nn.ModuleList(MaskBlock(width, config) for _ in range(config.num_blocks))
        self.deep = Deep(config.num_blocks * config.block_width, config)

    def forward(self, fields: Tensor) -> Tensor:
        """fields [B, F, D] -> logits [B]."""
        row, normed = fields.flatten(1), self.norm(fields).flatten(1)
        seen = torch.cat([block(row, normed) for block in self.blocks], dim=1)
        logits: Tensor = self.deep(seen)
        return logits


class MaskBlock(nn.Module):
    """`relu(norm(W (mask(row) * features)))`, the mask made by a hidden layer (sections 3.2 and 3.3)."""

    def __init__(self, width: int, config: BackboneConfig) -> None:
        super().__init__()
        aggregated = max(1, round(config.reduction_ratio * width))
        self.mask = nn.Sequential(nn.Linear(width, aggregated), nn.ReLU(), nn.Linear(aggregated, width))
        self.hidden = nn.Linear(width, config.block_width, bias=False)  # the norm has one
        self.norm = nn.LayerNorm(config.block_width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, row: Tensor, features: Tensor) -> Tensor:
        """The row and what to mask, both [B, width] -> [B, block_width]."""
        hidden = self.norm(self.hidden(self.mask(row) * features))
        dropped: Tensor = self.dropout(torch.relu(hidden))
        return dropped


class FieldNorm(nn.Module):
    """Layer norm of every field's vector, with gain and bias for each field."""

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_fields, dim))
        self.bias = nn.Parameter(torch.zeros(num_fields, dim))

    def forward(self, fields: Tensor) -> Tensor:
        """fields [B, F, D] -> [B, F, D]."""
        return functional.layer_norm(fields, fields.shape[-1:]) * self.gain + self.bias
