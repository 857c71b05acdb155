"""The cross-entropy of a sampled softmax over the distinct values of a batch, and of targets only.

With K candidates for each of B rows and F fields the logits would be the largest tensor of a pre-training
step by far. Three things keep them small: only cells that are targets have logits, about half of them; a
frequent value comes many times among the candidates, and has one column here; and they are made for a few
fields at a time, which keep to the caches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BLOCK = 2**20  # logits at a time: 4 MiB
_NONE = float("-inf")


@dataclass(frozen=True)
class Candidates:
    """The distinct values among the first K rows of a batch, each in a column; column K is none of them."""

    row: Tensor
    """[F, K + 1] int64: a row of the batch that has the value."""
    bias: Tensor
    """[F, K + 1]: -log q of the value, which corrects its logit; minus infinity in columns without one."""
    log_count: Tensor
    """[F, K + 1]: log of how many of the rows have it; 0 in columns without one."""
    own: Tensor
    """[F, B] int64: the column of every row's own value."""
    num_distinct: Tensor
    """[F] int64: the values, which stand in the first columns."""

    @classmethod
    def among(cls, ids: Tensor, is_candidate: Tensor, log_q: Tensor) -> "Candidates":
        """Finds them.

        Args:
            ids: [F, B] int64 of every row.
            is_candidate: [F, K] bool, of the first K rows; others of these are no candidates for any row.
            log_q: [F, B], log of the probability of drawing a row's value; equal for equal ids.
        """
        num_fields, limit = is_candidate.shape
        ids = ids.contiguous()
        values, order = ids[:, :limit].contiguous().sort(dim=1, stable=True)
        is_first = torch.ones_like(values, dtype=torch.bool)
        is_first[:, 1:] = values[:, 1:] != values[:, :-1]
        column = is_first.cumsum(1) - 1  # [F, K], by place in the order
        unused = column.new_full((num_fields, limit + 1), -1)
        # Writing all but the first of a value to the column behind the last leaves one for each.
        row = unused.scatter(1, torch.where(is_first, column, limit), order)
        row[:, limit] = -1
        count = torch.zeros_like(row).scatter_add_(1, column, torch.ones_like(column))
        is_used = (row >= 0) & is_candidate.gather(1, row.clamp(min=0, max=limit - 1))
        row = row.clamp(min=0)
        place = torch.searchsorted(values, ids).clamp(max=limit - 1)
        own = torch.where(values.gather(1, place) == ids, column.gather(1, place), limit)
        bias = torch.where(is_used, -log_q.gather(1, row), _NONE)
        return cls(row, bias, count.clamp(min=1).float().log(), own, column[:, -1] + 1)

    def other_values(self) -> Tensor:
        """[F, B]: how many values other than its own a row has to choose from."""
        is_used = (self.bias > _NONE).float()
        return is_used.sum(1, keepdim=True) - is_used.gather(1, self.own)

    def other_rows(self) -> Tensor:
        """[F, B]: how many of the rows have one of these values."""
        count = torch.where(self.bias > _NONE, self.log_count.exp().round(), 0.0)
        return count.sum(1, keepdim=True) - count.gather(1, self.own)

    def log_own(self) -> Tensor:
        """[F, B]: log of how often a row's own value comes, at least once."""
        return self.log_count.gather(1, self.own)

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """[F, B, K + 1]: of every value, uncorrected; minus infinity for a row's own and where there is none.

        Args:
            query: [F, B, D].
            keys: [F, B, D], of the values of the rows.
        """
        chosen = keys.gather(1, self.row[..., None].expand(-1, -1, keys.shape[-1]))
        scores = (query @ chosen.mT).float().masked_fill((self.bias == _NONE)[:, None], _NONE)
        return scores.scatter_(2, self.own[..., None], _NONE)


def sampled_cross_entropy(
    positive: Tensor, query: Tensor, keys: Tensor, candidates: Candidates, is_target: Tensor
) -> Tensor:
    """-log of the softmax of the true values among themselves and their candidates.

    Args:
        positive: [F, B], logits of the true values.
        query: [F, B, D].
        keys: [F, B, D], of the values of the rows; logits of candidates are `query @ keys + bias`. A value
            counts as often as it comes, the true one too: were its copies left out, a frequent value would
            have less than its share, and a guess by frequency could be beaten without knowing anything.
        candidates: of the fields.
        is_target: [F, B] bool.

    Returns:
        [F, B], in nats; 0 where a row is no target or has no candidates.
    """
    apply: Callable[..., Tensor] = _SampledCrossEntropy.apply
    return apply(positive, query, keys, candidates, is_target)


@dataclass(frozen=True)
class _Block:
    """A few fields, f of them; their targets, n at most, and values, u at most."""

    fields: slice
    rows: Tensor
    """[f, n] int64: the targets, filled up with rows that are none."""
    num_values: int


def _blocks(candidates: Candidates, is_target: Tensor) -> Iterator[_Block]:
    targets_first = is_target.sort(dim=1, descending=True, stable=True).indices
    # The one place that waits for the device.
    sizes = torch.stack([is_target.sum(1), candidates.num_distinct]).tolist()
    start, num_fields = 0, len(is_target)
    while start < num_fields:
        stop = start + 1
        num_rows, num_values = sizes[0][start], sizes[1][start]
        while stop < num_fields:
            rows, values = max(num_rows, sizes[0][stop]), max(num_values, sizes[1][stop])
            if (stop + 1 - start) * rows * (values + 1) > _BLOCK:
                break
            num_rows, num_values, stop = rows, values, stop + 1
        yield _Block(slice(start, stop), targets_first[start:stop, :num_rows], num_values)
        start = stop


class _SampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, positive: Tensor, query: Tensor, keys: Tensor, candidates: Candidates, is_target: Tensor
    ) -> Tensor:
        num_fields, num_rows, dim = query.shape
        flat_query, flat_keys = query.reshape(-1, dim), keys.reshape(-1, dim)
        first = torch.arange(num_fields, device=query.device)[:, None] * num_rows
        loss = torch.zeros_like(positive)
        bias = candidates.bias + candidates.log_count
        positive = positive + candidates.log_own()
        slices: list[slice] = []
        saved: list[Tensor] = []
        for block in _blocks(candidates, is_target):
            fields, rows, num = block.fields, block.rows, block.num_values
            row_index = rows + first[fields]  # [f, n]
            # [f, u + 1]: the last column makes room for the true value.
            key_index = candidates.row[fields, : num + 1] + first[fields]
            logits = (flat_query[row_index] @ flat_keys[key_index].mT).float()  # autocast would have bf16
            logits += bias[fields, None, : num + 1]
            own = candidates.own[fields].gather(1, rows).clamp(max=num)
            logits.scatter_(2, own[..., None], _NONE)
            logits[..., num] = positive[fields].gather(1, rows)
            log_p = logits.log_softmax(-1)
            is_real = is_target[fields].gather(1, rows)
            loss[fields].scatter_(1, rows, torch.where(is_real, -log_p[..., num], 0.0))
            slope = log_p.exp_()  # of the loss by the logits
            slope[..., num] -= 1.0
            slices.append(fields)
            saved += [rows, row_index, key_index[:, :-1], is_real, slope]
        ctx.slices = slices
        ctx.save_for_backward(query, keys, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, *saved = ctx.saved_tensors
        dim = query.shape[-1]
        flat_query, flat_keys = query.reshape(-1, dim), keys.reshape(-1, dim)
        of_positive = torch.zeros_like(gradient)
        of_query, of_keys = torch.zeros_like(flat_query), torch.zeros_like(flat_keys)
        for number, fields in enumerate(ctx.slices):
            rows, row_index, key_index, is_real, slope = saved[5 * number : 5 * number + 5]
            of_loss = torch.where(is_real, gradient[fields].gather(1, rows), 0.0)
            of_logits = slope * of_loss[..., None]  # not in place: a graph may be gone through again
            of_positive[fields].scatter_(1, rows, of_logits[..., -1])
            of_values = of_logits[..., :-1]
            by_row = (of_values @ flat_keys[key_index]).float()  # autocast would have bf16
            by_value = (of_values.mT @ flat_query[row_index]).float()
            of_query.index_copy_(0, row_index.flatten(), by_row.flatten(0, 1))
            of_keys.index_add_(0, key_index.flatten(), by_value.flatten(0, 1))
        return of_positive, of_query.view_as(query), of_keys.view_as(keys), None, None
