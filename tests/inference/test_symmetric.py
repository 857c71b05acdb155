"""Regeneration: what does not fit its row is repaired, and nothing else is touched."""

from functools import cache

import numpy as np
import pytest
import torch
from copied_log import FIELDS, SCHEMA, STATISTICS, UNKNOWN, VALUES, make_batch, trained_model
from helpers import lookup_of, part_of, plain, rows_of, score

from hetegen_rec.config.inference import SymmetricConfig
from hetegen_rec.config.schema import NUM_RESERVED_IDS
from hetegen_rec.inference.regeneration import Regenerator, draw_by_count, look_up_candidates
from hetegen_rec.inference.symmetric import Symmetric

HEADS = {"full softmax": 8, "sampled softmax": 0}
STEPS = {"full softmax": 150, "sampled softmax": 600}  # cosines take longer to be as sure
ROW, OTHER = 0, 7
"""A row of value 0, and the value of rows whose clicks are the opposite."""
WRONG = {(ROW, "two"): OTHER + NUM_RESERVED_IDS}


@cache
def model_with(head: str):
    torch.manual_seed(0)
    return trained_model(HEADS[head], STEPS[head])


def strategy(head="full softmax", seed=0, **config):
    model = model_with(head)
    reconstruction = model.network.reconstruction
    lookup = lookup_of(model, SCHEMA)
    candidates = look_up_candidates(lookup, SCHEMA, STATISTICS, reconstruction, 16, torch.device("cpu"))
    regenerator = Regenerator(reconstruction, candidates)
    return Symmetric(model.network, regenerator, SCHEMA, SymmetricConfig(**config), seed)


class Spy:
    """Notes the tokens that the network was asked to score."""

    def __init__(self, network, monkeypatch):
        original = network.score

        def watched(tokens, present):
            self.tokens = tokens
            return original(tokens, present)

        monkeypatch.setattr(network, "score", watched)


def test_without_rounds_it_is_plain_to_the_last_bit():
    model = model_with("full softmax")
    rows = rows_of(model, make_batch(WRONG))
    scored = score(strategy(rounds=0), rows)
    assert torch.equal(scored.probabilities, plain(model, rows))
    assert set(scored.passes.tolist()) == {1.0}


@pytest.mark.parametrize(("rounds", "folds", "passes"), [(1, 2, 3.0), (2, 2, 5.0), (3, 4, 13.0), (1, 9, 7.0)])
def test_a_round_costs_a_pass_a_fold(rounds, folds, passes):
    scored = score(strategy(rounds=rounds, folds=folds), rows_of(model_with("full softmax"), make_batch()))
    assert set(scored.passes.tolist()) == {passes}


@pytest.mark.parametrize("head", HEADS)
def test_a_corrupted_cell_gets_the_value_that_the_row_implies(head, monkeypatch):
    model = model_with(head)
    rows, spy = rows_of(model, make_batch(WRONG)), Spy(model.network, monkeypatch)
    score(strategy(head, rounds=2), rows)
    place = FIELDS.index("two")
    table = model.ebc.embedding_bags["two"].weight[NUM_RESERVED_IDS:]
    distances = (table - spy.tokens[ROW, place]).norm(dim=1)
    assert distances.argmin() == VALUES[ROW]
    assert distances[VALUES[ROW]] < 0.5 * distances[OTHER]


@pytest.mark.parametrize("head", HEADS)
def test_cells_that_fit_stay_as_they_are(head, monkeypatch):
    model = model_with(head)
    rows, spy = rows_of(model, make_batch(WRONG)), Spy(model.network, monkeypatch)
    score(strategy(head), rows)
    assert torch.equal(spy.tokens[1:], rows.tokens[1:])


@pytest.mark.parametrize("head", HEADS)
def test_the_score_comes_back_to_that_of_the_clean_row(head):
    model = model_with(head)
    clean = plain(model, rows_of(model, make_batch()))[ROW]
    rows = rows_of(model, make_batch(WRONG))
    before, after = plain(model, rows)[ROW], score(strategy(head, rounds=2), rows).probabilities[ROW]
    assert (clean - before).abs() > 0.01
    assert (clean - after).abs() < 0.3 * (clean - before).abs()


def test_a_cell_without_a_value_of_its_own_is_not_judged(monkeypatch):
    model = model_with("full softmax")
    rows = rows_of(model, make_batch({(ROW, "two"): UNKNOWN}))
    spy = Spy(model.network, monkeypatch)
    score(strategy(noise_share=0.5), rows)
    place = FIELDS.index("two")
    assert torch.equal(spy.tokens[ROW, place], rows.tokens[ROW, place])


@pytest.mark.parametrize("head", HEADS)
def test_a_score_does_not_depend_on_who_shares_the_batch(head):
    rows = rows_of(model_with(head), make_batch(WRONG))
    whole = score(strategy(head), rows).probabilities
    alone = score(strategy(head), part_of(rows, [ROW])).probabilities
    torch.testing.assert_close(alone, whole[[ROW]], atol=1e-6, rtol=0)


def test_lift_is_the_log_ratio_of_posterior_and_marginal():
    """All fields are copies: unseen, a cell's value is all but certain, against one in eight."""
    model = model_with("full softmax")
    rows = rows_of(model, make_batch())
    made = strategy()
    with torch.no_grad():
        hidden = made._denoise_without(rows.tokens, [0], rows)
        judgement = made._regenerator.judge("one", 0, hidden, rows)
    assert np.log(8) - 0.2 < judgement.lift.mean() < np.log(8) + 1e-4


def test_candidates_are_drawn_in_proportion_to_their_counts():
    drawn = draw_by_count(np.array([0, 1, 5, 0, 2]), 16)
    assert np.bincount(drawn, minlength=5).tolist() == [0, 2, 10, 0, 4]


def test_every_token_is_judged_once_a_round():
    for folds in strategy(rounds=3, folds=3)._rounds:
        assert sorted(place for fold in folds for place in fold) == list(range(len(FIELDS)))
