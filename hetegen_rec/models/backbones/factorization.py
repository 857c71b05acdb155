"""Linear and factorised models: LR, FM, DeepFM."""

from torch import Tensor, nn

from hetegen_rec.config.backbone import BackboneConfig
from hetegen_rec.models.backbones.layers import Deep, FirstOrder


class FM(nn.Module):
    """Factorization machine: first-order terms and `sum_{i<j} <e_i, e_j>` (Rendle, ICDM 2010)."""

    def __init__(self, num_fields: int, dim: int) -> None:
        super().__init__()
        self.first_order = FirstOrder(num_fields, dim)

    def forward(self, fields: Tensor) -> Tensor:
        """fields [B, F, D] -> logits [B]."""
        return self.first_order(fields) + pairwise_products(fields)


class DeepFM(nn.Module):
    """A factorization machine and hidden layers side by side, on the same vectors (arXiv 1703.04247)."""

    def __init__(self, num_fields: int, dim: int, config: BackboneConfig) -> None:
        super().__init__()
        self.machine = FM(num_fields, dim)
        self.deep = Deep(num_fields * dim, config)

    def forward(self, fields: Tensor) -> Tensor:
        """fields [B, F, D] -> logits [B]."""
        return self.machine(fields) + self.deep(fields.flatten(1))


def pairwise_products(fields: Tensor) -> Tensor:
    """Sum of the dot products of all pairs of fields [B, F, D], [B], at the cost of one pass over them.

    Each field is multiplied by the sum of the others, which is also its gradient. As every pair comes twice
    that way, half of the value is taken off again, but nothing of the gradient: autograd would need twice as
    many passes over all fields. TorchRec's FactorizationMachine is no substitute: it also multiplies
    components of different dimensions.
    """
    others = (fields.sum(1, keepdim=True) - fields).detach()
    twice = (fields * others).sum((1, 2))
    return twice - 0.5 * twice.detach()
