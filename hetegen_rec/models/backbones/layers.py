"""Layers that several backbones have. Each turns a row's fields [B, F, D] into something smaller."""

from torch import Tensor, nn
from torchrec.modules.mlp import MLP

from hetegen_rec.config.backbone import BackboneConfig


class FirstOrder(nn.Module):
    """One number for every value of every field, summed: a readout `w_f . e_f` of the looked-up vectors.

    It is as expressive as one-dimensional tables beside the others, without a second lookup. Readouts start
    with a norm around 1, so that the logit starts near 0 with the tables, while a table moves along its
    readout as fast as a table of numbers would; small readouts before small tables would hold each other up.
    """

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        self.readout = nn.Linear(num_fields * dim, 1)
        nn.init.normal_(self.readout.weight, std=dim**-0.5)
        nn.init.zeros_(self.readout.bias)

    def forward(self, fields: Tensor) -> Tensor:
        """fields [B, F, D] -> [B]."""
        logit: Tensor = self.readout(fields.flatten(1))
        return logit.squeeze(-1)


class Deep(nn.Module):
    """The deep part as a logit: hidden layers over a row's vector and a linear unit."""

    def __init__(self, width: int, config: BackboneConfig) -> None:
        super().__init__()
        self.hidden = hidden_layers(width, config)
        self.output = nn.Linear(last_width(width, config), 1)

    def forward(self, row: Tensor) -> Tensor:
        """row [B, width] -> [B]."""
        logit: Tensor = self.output(self.hidden(row))
        return logit.squeeze(-1)


def hidden_layers(width: int, config: BackboneConfig) -> MLP:
    """The configured hidden layers behind an input [B, width]: linear, ReLU, dropout."""
    return MLP(
        width, list(config.hidden), activation=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(config.dropout))
    )


def last_width(width: int, config: BackboneConfig) -> int:
    """Width of what `hidden_layers` puts out."""
    return config.hidden[-1] if config.hidden else width
