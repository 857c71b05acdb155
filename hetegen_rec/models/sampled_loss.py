"""The cross-entropy of a sampled softmax, in as few passes over its logits as it takes.

With K candidates for each of B rows and F fields the logits are the largest tensor of a pre-training step.
Put together from torch's own functions, the loss writes several of that size; here it is one, which also
serves the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sampled_cross_entropy(positive: Tensor, query: Tensor, keys: Tensor, bias: Tensor, hit: Tensor) -> Tensor:
    """-log of the softmax of the positives among themselves and their candidates.

    Args:
        positive: [F, B], logits of the true values.
        query: [F, B, D].
        keys: [F, K, D], of the candidates; their logits are `query @ keys + bias`.
        bias: [F, K], minus infinity for what is no candidate at all.
        hit: [F, B, K] bool, candidates that are the true value of the row: no negatives.

    Returns:
        [F, B], in nats; 0 where a row has no candidates.
    """
    apply: Callable[..., Tensor] = _SampledCrossEntropy.apply
    return apply(positive, query, keys, bias, hit)


def candidate_logits(query: Tensor, keys: Tensor, bias: Tensor, hit: Tensor) -> Tensor:
    """Logits [F, B, K] of the candidates, minus infinity for those that are none."""
    logits = (query @ keys.mT).float()  # autocast would have bf16
    return logits.add_(bias[:, None]).masked_fill_(hit, float("-inf"))


class _SampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, positive: Tensor, query: Tensor, keys: Tensor, bias: Tensor, hit: Tensor) -> Tensor:
        logits = candidate_logits(query, keys, bias, hit)
        highest = torch.maximum(logits.amax(-1), positive)
        odds = logits.sub_(highest[..., None]).exp_()  # [F, B, K]
        odds_of_true = (positive - highest).exp()
        total = odds.sum(-1) + odds_of_true
        ctx.save_for_backward(odds, odds_of_true, total, query, keys)
        return total.log() + highest - positive

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        odds, odds_of_true, total, query, keys = ctx.saved_tensors
        of_logits = odds * (gradient / total)[..., None]  # not in place: a graph may be gone through again
        of_positive = gradient * (odds_of_true / total - 1.0)
        return of_positive, of_logits @ keys, of_logits.mT @ query, None, None
