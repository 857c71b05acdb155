"""At which place a head puts the true value, out of all that it chooses from."""

from functools import cache

import pytest
import torch
from small_log import FULL, SAMPLED, Log, column, make_model

from hetegen_rec.models.reconstruction import Reconstruction


@cache
def log():
    return Log(64)


def reconstructed(training=False, **batch):
    model = make_model(log(), "pretrain").train(training)
    rows = log().batch(**batch)
    tokens, _ = model.network.assembly(model.ebc(rows.kjt))
    return model.network.reconstruct(tokens, rows.ids >= 0, rows)


def full_head():
    heads = make_model(log(), "pretrain").network.reconstruction
    assert isinstance(heads, Reconstruction)
    return heads.full


def test_the_rank_counts_the_values_that_are_liked_no_less():
    batch, head = log().batch(), full_head()
    truth = batch.ids[:, column("hour")] - 2
    known = truth >= 0
    logits = torch.zeros(64, head.classes["hour"].out_features)
    rows = torch.arange(64)[known]
    assert (head.rank("hour", logits, batch)[known] == logits.shape[1] - 1).all()  # ties count against it
    logits[rows, truth[known]] = 1.0
    assert (head.rank("hour", logits, batch)[known] == 0).all()
    logits[rows, (truth[known] + 1) % logits.shape[1]] = 2.0
    assert (head.rank("hour", logits, batch)[known] == 1).all()


def test_of_a_set_the_best_of_its_values_counts():
    batch, head = log().batch(), full_head()
    bag = batch.kjt["genres"]
    sets = torch.split(bag.values(), bag.lengths().tolist())
    row = next(row for row, values in enumerate(sets) if len(values[values >= 2].unique()) > 1)
    own = (sets[row][sets[row] >= 2] - 2).unique()
    logits = torch.zeros(64, head.classes["genres"].out_features)
    logits[row, own[-1]] = 1.0
    assert head.rank("genres", logits, batch)[row] == 0
    logits[row] = 1.0
    assert head.rank("genres", logits, batch)[row] == logits.shape[1] - len(own)


def test_training_ranks_nothing():
    assert reconstructed(training=True)[2].rank is None


def test_a_loss_of_nothing_is_a_first_place():
    _, _, rows = reconstructed()
    assert rows.rank.shape == rows.loss.shape == (64, len(FULL) + len(SAMPLED))
    sampled = rows.loss[:, len(FULL) :]
    # Below log 2 the true value has more than half of the probability.
    sure = (sampled < 0.69) & rows.is_target[:, len(FULL) :]
    assert (rows.rank[:, len(FULL) :][sure] == 0).all()
    unsure = (sampled > 5.0) & rows.is_target[:, len(FULL) :]
    assert (rows.rank[:, len(FULL) :][unsure] > 0).all()


@pytest.mark.parametrize("stop", [16, 64])
def test_in_batch_candidates_are_the_rows_of_the_batch(stop):
    _, _, rows = reconstructed(stop=stop)
    assert rows.rank[:, len(FULL) :].max() < stop
