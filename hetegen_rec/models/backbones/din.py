"""DIN: a history is what of it matters to the item at hand."""

import torch
from torch import Tensor, nn
from torchrec.modules.mlp import MLP

from hetegen_rec.config.backbone import BackboneConfig
from hetegen_rec.config.schema import Schema


class TargetAttentionPooling(nn.Module):
    """One vector a field: the token itself, or a sequence's items weighted by their bearing on the target.

    The target of a sequence is the field whose items it holds. As in arXiv 1706.06978, section 4.3, weights
    are not normalised, so that the size of the result tells how much of the history concerns the target; an
    empty history is the zero vector.
    """

    def __init__(self, schema: Schema, dim: int, config: BackboneConfig) -> None:
        super().__init__()
        self.sizes = {
            name: stop - start for name in schema.field_names for start, stop in [schema.span(name)]
        }
        sequences = [field for field in schema.fields if field.kind == "sequence"]
        self.targets = {field.name: field.table_name for field in sequences}
        self.units = nn.ModuleDict({name: ActivationUnit(dim, config) for name in self.targets})

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """tokens [B, T, D] and present [B, T] bool -> [B, F, D]."""
        sizes = list(self.sizes.values())
        parts = dict(zip(self.sizes, torch.split(tokens, sizes, dim=1), strict=True))
        are_there = dict(zip(self.sizes, torch.split(present, sizes, dim=1), strict=True))
        pooled = []
        for name, items in parts.items():
            if name in self.targets:
                target = parts[self.targets[name]].squeeze(1)
                weights = self.units[name](items, target) * are_there[name]
                pooled.append((weights[..., None] * items).sum(1))
            else:
                pooled.append(items.squeeze(1))
        return torch.stack(pooled, dim=1)


class ActivationUnit(nn.Module):
    """How much each item of a history matters to a target: hidden layers over the two and what differs.

    It sees item, target, their difference and their product, as the authors' code does. Its activation is
    PReLU: the paper's other one, Dice, normalises over the batch, so that a score would depend on padding,
    on the number of ranks and on the rows beside it.
    """

    def __init__(self, dim: int, config: BackboneConfig) -> None:
        super().__init__()
        widths = list(config.attention_hidden)
        self.hidden = MLP(4 * dim, widths, activation=nn.PReLU)
        self.output = nn.Linear(widths[-1] if widths else 4 * dim, 1)

    def forward(self, items: Tensor, target: Tensor) -> Tensor:
        """items [B, L, D] and target [B, D] -> weights [B, L]."""
        target = target[:, None].expand_as(items)
        seen = torch.cat([items, target, items - target, items * target], dim=-1)
        weights: Tensor = self.output(self.hidden(seen))
        return weights.squeeze(-1)
