"""Heads that score a row: p(click | row) as a logit."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from hetegen_rec.config.run import CTRConfig
from hetegen_rec.config.schema import Schema
from hetegen_rec.models.generation import FeatureGenerator


class FieldPooling(nn.Module):
    """One vector a field: the token itself, or the mean of a sequence's present items."""

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.sizes: list[int] = []
        """Tokens of every part: a sequence, or fields in a row that are none."""
        self.is_sequence: list[bool] = []
        for field in schema.fields:
            start, stop = schema.span(field.name)
            if field.kind != "sequence" and self.is_sequence and not self.is_sequence[-1]:
                self.sizes[-1] += stop - start
            else:
                self.sizes.append(stop - start)
                self.is_sequence.append(field.kind == "sequence")

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """tokens [B, T, D] and present [B, T] bool -> [B, F, D]."""
        if not any(self.is_sequence):
            return tokens
        # Split at once: every slice would fill a gradient of all tokens of its own in the backward pass.
        parts = zip(
            self.is_sequence,
            torch.split(tokens, self.sizes, dim=1),
            torch.split(present, self.sizes, dim=1),
            strict=True,
        )
        pooled = [
            mean_of_present(items, is_there)[:, None] if is_sequence else items
            for is_sequence, items, is_there in parts
        ]
        return torch.cat(pooled, dim=1)


def mean_of_present(items: Tensor, is_there: Tensor) -> Tensor:
    """Items [B, L, D], of which [B, L] exist -> [B, D]; zero where none does."""
    weight = is_there[..., None].to(items.dtype)
    return (items * weight).sum(1) / weight.sum(1).clamp(min=1.0)


class MLPHead(nn.Module):
    """An MLP over every field's row and hidden vector, plus a first-order term.

    The first-order term is linear in the looked-up rows, one weight vector a field: as expressive
    as a one-dimensional table, without a second lookup. With `generate`, regenerated rows take the place of
    the looked-up ones.
    """

    def __init__(self, schema: Schema, dim: int, config: CTRConfig, *, generate: bool = False) -> None:
        super().__init__()
        num_fields = len(schema.fields)
        self.pooling = FieldPooling(schema)
        self.first_order = nn.Linear(num_fields * dim, 1)
        widths = [(2 * num_fields + 1) * dim, *config.hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(config.dropout)]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        self.generator = FeatureGenerator(num_fields, dim) if generate else None

    def forward(self, tokens: Tensor, hidden: Tensor, present: Tensor) -> Tensor:
        """Clean tokens [B, T, D], hidden [B, T + 1, D], present [B, T] -> logits [B]."""
        rows = self.pooling(tokens, present)
        if self.generator is not None:
            rows = self.generator(rows)
        rows = rows.flatten(1)
        of_tokens, of_label = torch.split(hidden, [tokens.shape[1], 1], dim=1)
        seen = self.pooling(of_tokens, present).flatten(1)
        features = torch.cat([rows, seen, of_label.squeeze(1)], dim=1)
        return (self.mlp(features) + self.first_order(rows)).squeeze(-1)


class LabelHead(nn.Module):
    """Two-way softmax over the label element of the set, as a logit."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.classes = nn.Linear(dim, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, T + 1, D] -> log p(1) - log p(0), [B]."""
        logits = self.classes(hidden[:, -1])
        return logits[:, 1] - logits[:, 0]
