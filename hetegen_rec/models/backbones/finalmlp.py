"""FinalMLP: two streams of hidden layers, each with a gate of its own, fused bilinearly."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.modules.mlp import MLP

from hetegen_rec.config.backbone import BackboneConfig
from hetegen_rec.models.backbones.layers import hidden_layers


class FinalMLP(nn.Module):
    """Two-stream MLP with feature gates and bilinear fusion (arXiv 2304.00902, sections 3.2 and 3.3).

    Each stream sees the row under a gate between 0 and 2. The gates look at different fields, or, where none
    are named, learn a constant each.
    """

    def __init__(self, field_names: Sequence[str], dim: int, config: BackboneConfig) -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            FeatureGate(field_names, names, dim, config) for names in (config.first_gate, config.second_gate)
        )
        width = len(field_names) * dim
        self.streams = nn.ModuleList(hidden_layers(width, config) for _ in self.gates)
        self.fusion = BilinearFusion(config.hidden[-1], config.num_heads)

    def forward(self, fields: Tensor) -> Tensor:
        """fields [B, F, D] -> logits [B]."""
        row = fields.flatten(1)
        first, second = (
            stream(row * gate(fields)) for gate, stream in zip(self.gates, self.streams, strict=True)
        )
        logits: Tensor = self.fusion(first, second)
        return logits


class FeatureGate(nn.Module):
    """`2 sigmoid(MLP(context))`, one factor for each component of the row, 1 on average at first.

    The context is the vectors of some fields, or a learnt vector for all rows. The paper gives contexts
    tables of their own; here they are the looked-up vectors.
    """

    context: Tensor | None
    seen: Tensor

    def __init__(
        self, field_names: Sequence[str], seen: Sequence[str], dim: int, config: BackboneConfig
    ) -> None:
        super().__init__()
        places = torch.tensor([field_names.index(name) for name in seen], dtype=torch.int64)
        self.register_buffer("seen", places, persistent=False)
        self.context = None if seen else nn.Parameter(torch.randn(1, dim) * dim**-0.5)
        widths = [*config.gate_hidden, len(field_names) * dim]
        self.mlp = MLP(max(1, len(seen)) * dim, widths, activation_on_last=False)

    def forward(self, fields: Tensor) -> Tensor:
        """fields [B, F, D] -> factors [B, F D], or [1, F D] without fields to look at."""
        context = fields.index_select(1, self.seen).flatten(1) if self.context is None else self.context
        return 2.0 * torch.sigmoid(self.mlp(context))


class BilinearFusion(nn.Module):
    """`b + w_1 . o_1 + w_2 . o_2 + sum_h o_1h W_h o_2h`, both streams cut into blocks h."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        block = width // num_heads
        self.first = nn.Linear(width, 1)
        self.second = nn.Linear(width, 1, bias=False)
        self.interaction = nn.Parameter(torch.randn(num_heads, block, block) / block)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Both streams [B, width] -> logits [B]."""
        linear = self.first(first) + self.second(second)
        shape = (first.shape[0], *self.interaction.shape[:2])  # [B, heads, width / heads]
        bilinear = torch.einsum("bhi,hij,bhj->b", first.view(shape), self.interaction, second.view(shape))
        return linear.squeeze(-1) + bilinear
