"""The loss of a sampled softmax is that of torch's own functions, gradients included."""

import pytest
import torch
from torch.nn import functional

from hetegen_rec.models.sampled_loss import candidate_logits, sampled_cross_entropy

F, B, K, D = 3, 5, 4, 6


def inputs(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    positive, query, keys = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((F, B), (F, B, D), (F, K, D))
    )
    bias = torch.randn(F, K, generator=generator, dtype=torch.float64)
    bias[0, 1] = float("-inf")
    hit = torch.rand(F, B, K, generator=generator) < 0.3
    hit[2, 0] = True  # a row without candidates
    return positive, query, keys, bias, hit


def reference(positive, query, keys, bias, hit):
    negative = (query @ keys.mT + bias[:, None]).masked_fill(hit, float("-inf"))
    logits = torch.cat([positive[..., None], negative], -1).flatten(0, 1)
    zeros = torch.zeros(F * B, dtype=torch.long)
    return functional.cross_entropy(logits, zeros, reduction="none").view(F, B)


@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_loss_and_gradients_are_those_of_the_cross_entropy(shift):
    found, expected = [], []
    for loss, into in ((sampled_cross_entropy, found), (reference, expected)):
        positive, query, keys, bias, hit = inputs()
        value = loss(positive + shift, query, keys, bias, hit)
        (value * torch.arange(1.0, B + 1.0)).sum().backward()
        into += [value.detach(), positive.grad, query.grad, keys.grad]
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-5, atol=1e-6)


def test_a_row_without_candidates_loses_nothing_and_moves_nothing():
    positive, query, keys, bias, hit = inputs()
    loss = sampled_cross_entropy(positive, query, keys, bias, hit)
    assert loss[2, 0] == 0.0
    loss[2, 0].backward()
    assert not query.grad.any()
    assert not positive.grad.any()


def test_a_graph_that_is_kept_gives_the_same_gradient_again():
    positive, query, keys, bias, hit = inputs()
    loss = sampled_cross_entropy(positive, query, keys, bias, hit).sum()
    first = torch.autograd.grad(loss, query, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, query)[0])


def test_what_is_no_candidate_has_no_odds():
    _, query, keys, bias, hit = inputs()
    logits = candidate_logits(query.detach(), keys.detach(), bias, hit)
    assert logits[hit].isneginf().all()
    assert logits[0, :, 1].isneginf().all()
