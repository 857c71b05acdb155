"""AutoInt: self-attention between fields."""

import torch
from torch import Tensor, nn

from hetegen_rec.config.backbone import BackboneConfig
from hetegen_rec.models.attention import attend
from hetegen_rec.models.backbones.layers import Deep


class AutoInt(nn.Module):
    """Interacting layers over the fields, read out linearly, beside a deep part (arXiv 1810.11921, AutoInt+).

    Without hidden layers the deep part is linear, and what is left is AutoInt with first-order terms.
    """

    def __init__(self, num_fields: int, dim: int, config: BackboneConfig) -> None:
        super().__init__()
        layers = [InteractingLayer(dim, config.num_heads, config.dropout) for _ in range(config.num_layers)]
        self.interacting = nn.Sequential(*layers)
        self.output = nn.Linear(num_fields * dim, 1, bias=False)  # the deep part has a bias
        self.deep = Deep(num_fields * dim, config)

    def forward(self, fields: Tensor) -> Tensor:
        """fields [B, F, D] -> logits [B]."""
        logit: Tensor = self.output(self.interacting(fields).flatten(1))
        return logit.squeeze(-1) + self.deep(fields.flatten(1))


class InteractingLayer(nn.Module):
    """`relu(Attention(e) + W e)`, the heads' logits plain dot products (section 4.4: unscaled)."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.residual = nn.Linear(dim, dim, bias=False)

    def forward(self, fields: Tensor) -> Tensor:
        """fields [B, F, D] -> [B, F, D]."""
        batch, num_fields, dim = fields.shape
        shape = (batch, num_fields, self.num_heads, dim // self.num_heads)
        query, key, value = (
            part.view(shape).transpose(1, 2) for part in self.query_key_value(fields).chunk(3, dim=-1)
        )  # each [B, H, F, D / H]
        dropout = self.dropout if self.training else 0.0
        mixed = attend(query, key, value, dropout_p=dropout, scale=1.0)
        return torch.relu(mixed.transpose(1, 2).reshape(fields.shape) + self.residual(fields))
