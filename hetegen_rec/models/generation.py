"""Supervised feature generation: what a model scores is made from the row, not taken from the tables."""

import torch
from torch import Tensor, nn


class FeatureGenerator(nn.Module):
    """Regenerates the vector of every field from those of all fields (SFG, arXiv 2512.14041).

    An encoder gives every field a hidden vector, `z_f = relu(W_f [v_1 .. v_F] + b_f)`, a decoder makes of it
    the vector that takes the place of v_f, `U_f z_f + c_f`. There is no loss but that of the clicks.

    Found in the paper's abstract and in summaries of it: encoder, decoder and the loss, an encoder of one
    layer with weights for each field, and that generated vectors meet the looked-up ones in the interaction,
    whose own matrices are the decoder. Derived here, so that it fits in front of any model: a decoder matrix
    for each field, and generated vectors on both sides of every interaction. Both layers start such that the
    scale of the vectors stays.
    """

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(num_fields * dim, num_fields * dim)
        self.decoder = nn.Parameter(torch.randn(num_fields, dim, dim) * dim**-0.5)
        self.decoder_bias = nn.Parameter(torch.zeros(num_fields, dim))
        nn.init.kaiming_normal_(self.encoder.weight, nonlinearity="relu")
        nn.init.zeros_(self.encoder.bias)

    def forward(self, fields: Tensor) -> Tensor:
        """fields [B, F, D] -> [B, F, D]."""
        hidden = self.encoder(fields.flatten(1)).relu().view_as(fields)
        return torch.einsum("bfd,fde->bfe", hidden, self.decoder) + self.decoder_bias
