"""DCN-V2: explicit crosses of bounded degree, and hidden layers."""

import torch
from torch import Tensor, nn
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet

from hetegen_rec.config.backbone import BackboneConfig
from hetegen_rec.models.backbones.layers import hidden_layers, last_width


class DCNV2(nn.Module):
    """Deep & cross network, version 2 (arXiv 2008.13535, sections 3.2 to 3.5).

    A cross layer is `x_{l+1} = x_0 * (W_l x_l + b_l) + x_l`, with x_0 all fields in a row and W_l full or the
    product of two matrices of a low rank. `stacked` runs the hidden layers on the last x, `parallel` on x_0,
    and puts both results side by side.
    """

    def __init__(self, num_fields: int, dim: int, config: BackboneConfig) -> None:
        super().__init__()
        width = num_fields * dim
        self.cross = (
            CrossNet(width, config.num_layers)
            if config.rank is None
            else LowRankCrossNet(width, config.num_layers, config.rank)
        )
        self.is_stacked = config.structure == "stacked"
        self.hidden = hidden_layers(width, config)
        deep_width = last_width(width, config)
        self.output = nn.Linear(deep_width if self.is_stacked else width + deep_width, 1)

    def forward(self, fields: Tensor) -> Tensor:
        """fields [B, F, D] -> logits [B]."""
        row = fields.flatten(1)
        crossed = self.cross(row)
        seen = self.hidden(crossed) if self.is_stacked else torch.cat([crossed, self.hidden(row)], dim=1)
        logit: Tensor = self.output(seen)
        return logit.squeeze(-1)
