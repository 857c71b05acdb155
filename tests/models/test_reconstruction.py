"""Reconstruction heads against slow references."""

import math
from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from small_log import DIM, FULL, HISTORY, LENGTH, NUM_VALUES, SAMPLED, SCHEMA, TOKENS, Log, column, corrupt
from torch.nn import functional

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.run import ModelConfig, ReconstructionConfig
from hetegen_rec.config.schema import NUM_RESERVED_IDS, Schema
from hetegen_rec.models.corruption import RowNoise
from hetegen_rec.models.reconstruction import (
    FullSoftmax,
    Reconstruction,
    RowLosses,
    SampledSoftmax,
    check_growth,
    split_fields,
    vocabulary_parameters,
)
from hetegen_rec.models.sampled_loss import Candidates, sampled_cross_entropy

NUM_ROWS = 64


@cache
def log():
    return Log(NUM_ROWS)


class Case:
    """A noised batch and random vectors around the heads."""

    def __init__(self, noise_seed=1, **noise):
        generator = torch.Generator().manual_seed(noise_seed)
        self.batch = log().batch(noise_seed=noise_seed)
        table = torch.randn(int(self.batch.ids.max()) + 2, DIM, generator=generator)
        self.clean = table[self.batch.ids + 1].requires_grad_()  # equal ids have equal rows, absent ones too
        self.hidden = torch.randn(NUM_ROWS, len(TOKENS) + 1, DIM, generator=generator)
        self.corrupted = corrupt(log(), self.clean, self.batch, **noise)
        self.noise = RowNoise(self.batch, len(TOKENS))

    def full(self, names=FULL):
        torch.manual_seed(0)
        head = FullSoftmax(SCHEMA, log().statistics, names, DIM)
        return head, head(self.hidden, self.batch, self.corrupted)

    def sampled(self, num_candidates=NUM_ROWS, temperature=0.5, names=SAMPLED):
        torch.manual_seed(0)
        config = ReconstructionConfig(num_candidates=num_candidates, temperature=temperature)
        head = SampledSoftmax(SCHEMA, names, DIM, config)
        torch.nn.init.normal_(head.query)
        return head, head(self.hidden, self.clean, self.batch, self.corrupted, self.noise)


def model_with(**config):
    return ModelConfig.model_validate({"dim": DIM, "reconstruction": config})


def split(schema=SCHEMA, **config):
    return split_fields(schema, log().statistics, model_with(**config))


def test_small_vocabularies_get_a_full_softmax_and_sequences_never_do():
    assert split(full_softmax_max=8) == (FULL, SAMPLED)
    assert split(full_softmax_max=12) == (["genres", "hour", "place"], ["user", "history", "item"])
    _, sampled = split(full_softmax_max=1000)
    assert sampled == ["history"]
    assert split(full_softmax_max=0) == ([], list(SCHEMA.field_names))


def test_fields_that_are_not_to_be_reconstructed_have_no_head():
    described = SCHEMA.model_dump(mode="json")
    described["fields"][0]["reconstruct"] = False
    full, sampled = split(Schema.model_validate(described))
    assert "user" not in full + sampled


def test_a_field_of_one_value_has_nothing_to_reconstruct():
    statistics = Log(NUM_ROWS).statistics
    object.__setattr__(statistics.fields["hour"], "num_ids", NUM_RESERVED_IDS + 1)
    full, sampled = split_fields(SCHEMA, statistics, model_with())
    assert "hour" not in full + sampled


def test_full_softmax_is_the_cross_entropy_over_the_vocabulary():
    case = Case()
    head, losses = case.full()
    place, index = column("hour"), FULL.index("hour")
    assert torch.equal(losses.is_target[:, index], case.corrupted.is_target[:, place])
    logits = head.classes[FULL[index]](case.hidden[:, place])
    assert logits.shape[1] == NUM_VALUES["hour"]
    for row in range(NUM_ROWS):
        expected = torch.tensor(0.0)
        if case.corrupted.is_target[row, place]:
            value = case.batch.ids[row, place] - NUM_RESERVED_IDS
            expected = -logits[row].log_softmax(0)[value]
        torch.testing.assert_close(losses.loss[row, index], expected)


def test_a_bag_is_the_mean_over_its_known_values():
    case = Case()
    head, losses = case.full()
    place, index = column("genres"), FULL.index("genres")
    log_p = head.classes[FULL[index]](case.hidden[:, place]).log_softmax(-1)
    bags = log().table["genres"].to_pylist()
    mixed = 0
    for row in torch.nonzero(losses.is_target[:, index])[:, 0].tolist():
        known = [value - NUM_RESERVED_IDS for value in bags[row] if value >= NUM_RESERVED_IDS]
        mixed += 0 < len(known) < len(bags[row])
        expected = -torch.stack([log_p[row, value] for value in known]).mean()
        torch.testing.assert_close(losses.loss[row, index], expected)
    assert mixed > 0
    assert (losses.loss[~losses.is_target[:, index], index] == 0).all()


def chosen(case, name):
    """The token that stands for the field in each row: a noised one, else a present one."""
    places = [i for i, token in enumerate(SCHEMA.tokens) if token.field == name]
    draws, ids = case.noise.picks(), case.batch.ids
    return [
        max(places, key=lambda p: (bool(case.corrupted.is_target[b, p]), bool(ids[b, p] >= 0), draws[b, p]))
        for b in range(NUM_ROWS)
    ]


def slow_sampled(case, head, name, num_candidates):
    """Losses, mean chance level and mean baseline of the targets by a loop over rows and candidates."""
    index = SAMPLED.index(name)
    places = chosen(case, name)
    ids = [int(case.batch.ids[b, p]) for b, p in enumerate(places)]
    log_q = [float(case.batch.log_prior[b, p]) for b, p in enumerate(places)]
    losses, chances, baselines = torch.zeros(NUM_ROWS), [], []
    for b, place in enumerate(places):
        if not case.corrupted.is_target[b, place]:
            continue
        query = case.hidden[b, place] @ head.query[index]

        def logit(k, query=query):
            cosine = functional.cosine_similarity(query, case.clean[k, places[k]], dim=0)
            return cosine / head.log_temperature[index].exp() - log_q[k]

        negatives = [k for k in range(num_candidates) if ids[k] >= NUM_RESERVED_IDS and ids[k] != ids[b]]
        copies = max(1, sum(ids[k] == ids[b] for k in range(num_candidates)))
        logits = torch.stack([logit(b) + math.log(copies), *(logit(k) for k in negatives)])
        losses[b] = -logits.log_softmax(0)[0]
        chances.append(math.log(1 + len({ids[k] for k in negatives})))
        baselines.append(math.log((copies + len(negatives)) / copies))
    return losses, sum(chances) / len(chances), sum(baselines) / len(baselines)


@torch.no_grad()
@pytest.mark.parametrize("num_candidates", [NUM_ROWS, 20])
@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_softmax_equals_the_reference(name, num_candidates):
    case = Case()
    head, losses = case.sampled(num_candidates)
    expected, chance, baseline = slow_sampled(case, head, name, num_candidates)
    index = SAMPLED.index(name)
    assert losses.is_target[:, index].any()
    assert 0 < chance < math.log(num_candidates)
    torch.testing.assert_close(losses.loss[:, index], expected, rtol=1e-4, atol=1e-4)
    assert losses.chance[index].item() == pytest.approx(chance)
    assert losses.baseline[index].item() == pytest.approx(baseline)


def test_chance_levels_of_full_softmaxes():
    _, losses = Case().full()
    expected = torch.tensor([math.log(NUM_VALUES[name]) for name in FULL])
    torch.testing.assert_close(losses.chance, expected)
    entropies = torch.tensor([log().statistics.fields[name].entropy for name in FULL])
    torch.testing.assert_close(losses.baseline, entropies)
    assert (losses.baseline < losses.chance).all()


def test_rows_without_a_target_get_no_loss():
    case = Case()
    for losses in (case.full()[1], case.sampled()[1]):
        assert (losses.loss[~losses.is_target] == 0).all()
        assert (losses.loss[losses.is_target] > 0).all()
        assert not losses.is_target.all()


def test_gradients_reach_the_rows_of_candidates_that_are_no_targets():
    case = Case(t_min=0.3, whole_sequence=0.0)
    _, losses = case.sampled(names=["item"])
    losses.loss.sum().backward()
    ids, is_target = case.batch.ids[:, column("item")], losses.is_target[:, 0]
    reached = case.clean.grad[:, column("item")].abs().amax(-1) > 0
    # One row stands for all that have its value: they are one row of the table.
    assert set(ids[reached].tolist()) == {value for value in ids.tolist() if value >= NUM_RESERVED_IDS}
    assert set(ids[reached].tolist()) - set(ids[is_target].tolist())


def test_where_all_candidates_are_the_value_itself_there_is_no_target():
    case = Case()
    case.batch.ids[:, column("item")] = NUM_RESERVED_IDS
    _, losses = case.sampled(names=["item"])
    assert not losses.is_target.any()
    torch.testing.assert_close(losses.loss, torch.zeros_like(losses.loss))
    assert losses.chance.isfinite().all()


@pytest.mark.parametrize("share", [0.02, 0.8])
def test_no_guess_by_frequency_alone_beats_the_baseline_however_seldom_or_skewed_a_field_is(share):
    """With `share` of the rows of one value, and with a value in only that share of the rows."""
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(2, 200, (1, 512)))
    probability = torch.full((200,), 1.0 / 198)
    if share > 0.5:
        ids[0, rng.random(512) < share] = 2
        probability = torch.full((200,), (1 - share) / 198)
        probability[2] += share
    else:
        ids[0, rng.random(512) >= share] = 0
    score_of_value = probability.log().requires_grad_()  # a guess by frequency
    scores = score_of_value[ids]
    loss = loss_by_scores(ids, scores, probability.log()[ids])
    is_target = ids >= NUM_RESERVED_IDS
    _, counts = ids[is_target].unique(return_counts=True)
    entropy = -(counts / counts.sum() * (counts / counts.sum()).log()).sum()
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-4)
    loss.backward()
    torch.testing.assert_close(score_of_value.grad, torch.zeros(200), atol=1e-6, rtol=0)


def loss_by_scores(ids, scores, log_q):
    """Mean cross-entropy where a value has its score in every row."""
    is_target = ids >= NUM_RESERVED_IDS
    candidates = Candidates.among(ids, is_target, log_q)
    query = torch.ones(*ids.shape, 1)
    loss = sampled_cross_entropy(scores - log_q, query, scores[..., None], candidates, is_target)
    return loss.sum() / is_target.sum()


def test_the_baseline_of_a_sampled_softmax_is_what_a_guess_by_frequency_costs():
    case = Case()
    case.batch.ids[: NUM_ROWS // 2, column("item")] = NUM_RESERVED_IDS
    _, losses = case.sampled(names=["item"])
    ids = case.batch.ids[:, column("item")]
    known = ids[ids >= NUM_RESERVED_IDS]
    shares = (known == ids[:, None]).sum(1) / len(known)
    expected = -shares[losses.is_target[:, 0]].log().mean()
    assert losses.baseline[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.baseline[0] < losses.chance[0]


def test_a_sequence_predicts_each_of_its_noised_items_equally_often():
    case = Case()
    case.batch.ids[:, HISTORY] = torch.arange(NUM_ROWS)[:, None] * LENGTH + torch.arange(LENGTH) + 2
    case.corrupted.is_target[:, HISTORY] = torch.tensor([True, False, True])
    config = ReconstructionConfig(num_candidates=NUM_ROWS)
    head = SampledSoftmax(SCHEMA, ["history"], DIM, config)
    counts = torch.zeros(LENGTH)
    for seed in range(30):
        noise = RowNoise(log().batch(noise_seed=seed), len(TOKENS))
        hidden = case.hidden.clone().requires_grad_()
        head(hidden, case.clean, case.batch, case.corrupted, noise).loss.sum().backward()
        counts += (hidden.grad[:, HISTORY].abs().amax(-1) > 0).sum(0)
    shares = counts / (30 * NUM_ROWS)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.0, 0.5]), atol=0.04, rtol=0)


def test_the_temperature_has_a_floor_that_it_can_leave_again():
    case = Case()
    head, _ = case.sampled(names=["item"])
    with torch.no_grad():
        head.log_temperature.fill_(math.log(1e-4))
    assert head.temperature().item() == pytest.approx(0.01)
    losses = head(case.hidden, case.clean, case.batch, case.corrupted, case.noise)
    assert losses.loss.isfinite().all()
    losses.loss.sum().backward()
    # Random vectors are wrong with confidence here, so the temperature must rise.
    assert head.log_temperature.grad.item() < 0


def test_all_heads_together_name_their_columns():
    case = Case()
    config = model_with(full_softmax_max=8, num_candidates=NUM_ROWS)
    torch.manual_seed(0)
    heads = Reconstruction(SCHEMA, log().statistics, config)
    losses = heads(case.hidden, case.clean, case.batch, case.corrupted, case.noise)
    assert heads.fields == FULL + SAMPLED
    assert losses.loss.shape == losses.is_target.shape == (NUM_ROWS, len(heads.fields))
    assert losses.chance.shape == losses.baseline.shape == (len(heads.fields),)
    torch.testing.assert_close(losses.loss[:, : len(FULL)], case.full()[1].loss)


@pytest.mark.parametrize("full_softmax_max", [0, 1000])
def test_a_schema_may_need_one_kind_of_head_only(full_softmax_max):
    fields = [field for field in SCHEMA.model_dump(mode="json")["fields"] if field["name"] != "history"]
    schema = Schema.model_validate({"label": "click", "fields": fields})
    config = model_with(full_softmax_max=full_softmax_max)
    heads = Reconstruction(schema, log().statistics, config)
    assert len(heads.fields) == len(fields)
    assert (heads.full is None) == (full_softmax_max == 0)
    assert (heads.sampled is None) == (full_softmax_max == 1000)


def test_losses_of_two_kinds_of_heads_are_put_side_by_side():
    def losses(value, width):
        ones = torch.ones(3, width)
        return RowLosses(value * ones, ones > 0, value * ones[0], 2 * value * ones[0])

    both = losses(1.0, 2).cat(losses(3.0, 1))
    assert both.loss.tolist() == [[1.0, 1.0, 3.0]] * 3
    assert both.chance.tolist() == [1.0, 1.0, 3.0]
    assert both.baseline.tolist() == [2.0, 2.0, 6.0]


def rows_of_tables(**grown):
    rows = {field.name: log().statistics.table_rows(field.name) for field in SCHEMA.table_owners}
    return rows | {name: count + NUM_RESERVED_IDS for name, count in grown.items()}


def test_tables_may_grow_while_every_field_keeps_its_head():
    config = model_with(full_softmax_max=12)
    check_growth(SCHEMA, rows_of_tables(), rows_of_tables(genres=12, item=10_000), config)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"genres": 13}, r"'genres'.* to 13 values, past .*full_softmax_max: 12.*now 13"),
        ({"genres": 1}, {"genres": 2}, r"'genres'.* from 1 to 2 values.* no head.*train from the start"),
        ({"user": 1}, {}, r"'user'.*no head"),
    ],
    ids=["full to sampled", "none to full", "none to sampled"],
)
def test_a_field_that_outgrows_its_head_is_refused_by_name(before, after, message):
    config = model_with(full_softmax_max=12)
    with pytest.raises(ConfigError, match=message):
        check_growth(SCHEMA, rows_of_tables(**before), rows_of_tables(**after), config)


def test_parameters_that_grow_with_a_table_are_those_whose_shape_differs():
    config = model_with(full_softmax_max=12)
    small = Reconstruction(SCHEMA, log().statistics, config)
    grown = deepcopy(log().statistics)
    grown.fields["genres"] = replace(grown.fields["genres"], num_ids=NUM_RESERVED_IDS + 12)
    grown.fields["item"] = replace(grown.fields["item"], num_ids=NUM_RESERVED_IDS + 5000)
    large = Reconstruction(SCHEMA, grown, config).state_dict()
    assert {name for name, value in small.state_dict().items() if value.shape != large[name].shape} == {
        name for name, table in vocabulary_parameters(small).items() if table == "genres"
    }
    assert set(vocabulary_parameters(small).values()) == set(small.full_fields)
