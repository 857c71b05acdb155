"""The loss of a sampled softmax over distinct values is that over all candidates, gradients included."""

import pytest
import torch
from torch.nn import functional

from hetegen_rec.models import sampled_loss
from hetegen_rec.models.sampled_loss import Candidates, sampled_cross_entropy

F, B, K, D, V = 4, 40, 24, 6, 11
RESERVED = 2


class Inputs:
    """Rows whose keys and frequencies belong to their values, as looked-up ones do."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, V, (F, B), generator=generator)
        self.ids[2] = 5  # nothing but one value
        self.ids[3, K:] = V  # a value that no candidate has
        self.table = torch.randn(F, V + 1, D, generator=generator, requires_grad=True)
        self.query = torch.randn(F, B, D, generator=generator, requires_grad=True)
        frequencies = torch.rand(F, V + 1, generator=generator)
        self.log_q = frequencies.gather(1, self.ids).log()
        self.is_target = torch.rand(F, B, generator=generator) < torch.tensor([[0.2], [0.6], [1.0], [0.7]])
        self.is_candidate = self.ids[:, :K] >= RESERVED

    @property
    def leaves(self):
        return self.table, self.query

    def keys(self):
        return self.table.gather(1, self.ids[..., None].expand(-1, -1, D))

    def positive(self, shift: float):
        return (self.query * self.keys()).sum(-1) - self.log_q + shift


def loss_over_distinct(rows: Inputs, shift: float = 0.0):
    candidates = Candidates.among(rows.ids, rows.is_candidate, rows.log_q)
    return sampled_cross_entropy(rows.positive(shift), rows.query, rows.keys(), candidates, rows.is_target)


def loss_over_all(rows: Inputs, shift: float = 0.0):
    """By torch's own functions, a logit for each of the K candidates."""
    bias = torch.where(rows.is_candidate, -rows.log_q[:, :K], float("-inf"))
    negative = rows.query @ rows.keys()[:, :K].mT + bias[:, None]
    is_own = rows.ids[:, :, None] == rows.ids[:, None, :K]
    negative = negative.masked_fill(is_own, float("-inf"))
    copies = is_own.sum(-1).clamp(min=1)  # a row whose value no candidate has is its own
    true = rows.positive(shift) + copies.log()
    logits = torch.cat([true[..., None], negative], -1).flatten(0, 1)
    zeros = torch.zeros(F * B, dtype=torch.long)
    loss = functional.cross_entropy(logits, zeros, reduction="none").view(F, B)
    return torch.where(rows.is_target, loss, 0.0)


@pytest.mark.parametrize("block", [1, 2_000, 2**20])
@pytest.mark.parametrize("shift", [0.0, 300.0, -300.0])
def test_loss_and_gradients_are_those_over_all_candidates(shift, block, monkeypatch):
    monkeypatch.setattr(sampled_loss, "_BLOCK", block)
    found, expected = [], []
    for loss, into in ((loss_over_distinct, found), (loss_over_all, expected)):
        rows = Inputs()
        value = loss(rows, shift)
        (value * torch.arange(1.0, B + 1.0)).sum().backward()
        into += [value.detach(), *(leaf.grad for leaf in rows.leaves)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_row_without_candidates_loses_nothing_and_moves_nothing():
    rows = Inputs()
    loss = loss_over_distinct(rows)[2]  # every candidate is the row's own value
    assert not loss.any()
    loss.sum().backward()
    assert not any(leaf.grad.any() for leaf in rows.leaves)


def test_without_targets_nothing_is_lost():
    rows = Inputs()
    rows.is_target.zero_()
    loss = loss_over_distinct(rows)
    loss.sum().backward()
    assert not loss.any()
    assert not any(leaf.grad.any() for leaf in rows.leaves)


def test_a_graph_that_is_kept_gives_the_same_gradient_again():
    rows = Inputs()
    loss = loss_over_distinct(rows).sum()
    first = torch.autograd.grad(loss, rows.query, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, rows.query)[0])


def test_candidates_are_the_distinct_values_with_their_counts():
    rows = Inputs()
    candidates = Candidates.among(rows.ids, rows.is_candidate, rows.log_q)
    for field in range(F):
        values, counts = rows.ids[field, :K].unique(return_counts=True)
        assert candidates.num_distinct[field] == len(values)
        taken = candidates.row[field, : len(values)]
        assert torch.equal(rows.ids[field][taken], values)
        torch.testing.assert_close(candidates.log_count[field, : len(values)].exp(), counts.float())
        is_used = candidates.bias[field, : len(values)].isfinite()
        assert torch.equal(is_used, values >= RESERVED)
        assert candidates.bias[field, len(values) :].isneginf().all()


def test_scores_leave_out_own_values_and_what_is_no_candidate():
    rows = Inputs()
    query, keys = rows.query.detach(), rows.keys().detach()
    candidates = Candidates.among(rows.ids, rows.is_candidate, rows.log_q)
    scores = candidates.scores(query, keys)
    for field in range(F):
        values = rows.ids[field, :K].unique()
        of_values = scores[field, :, : len(values)]
        is_own = rows.ids[field][:, None] == values
        is_scored = ~is_own & (values >= RESERVED)
        assert torch.equal(of_values.isfinite(), is_scored)
        assert scores[field, :, len(values) :].isneginf().all()
        plain = query[field] @ keys[field, candidates.row[field, : len(values)]].T
        torch.testing.assert_close(of_values[is_scored], plain[is_scored])


def test_others_are_the_candidates_with_another_value():
    rows = Inputs()
    candidates = Candidates.among(rows.ids, rows.is_candidate, rows.log_q)
    others = (rows.ids[:, :, None] != rows.ids[:, None, :K]) & rows.is_candidate[:, None]
    assert torch.equal(candidates.other_rows(), others.sum(-1).float())
    for field in range(F):
        values = [len(rows.ids[field, :K][is_other].unique()) for is_other in others[field]]
        assert candidates.other_values()[field].tolist() == values
