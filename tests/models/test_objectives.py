"""The objectives besides diffusion: what they corrupt, what they predict, and what stages make of them."""

import math
from collections import Counter
from functools import cache
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_log import DIM, HISTORY, SCHEMA, TOKENS, Log, column, make_model, model_config
from torch.nn import functional

from hetegen_rec.config.run import Stage
from hetegen_rec.config.schema import NUM_RESERVED_IDS, Schema
from hetegen_rec.models.corruption import LABEL_MASK_ID, RowNoise, choose_share
from hetegen_rec.models.objectives.factory import make_objective
from hetegen_rec.models.objectives.masked_features import drawn_rows
from hetegen_rec.models.reconstruction import check_growth

NUM_ROWS = 64
WITH_ITEM = Schema.model_validate({**SCHEMA.model_dump(mode="json"), "item": "item"})
OBJECTIVES = {
    "next_item": {"name": "next_item", "masked": ["place"]},
    "masked_features": {"name": "masked_features", "num_negatives": 10},
    "replaced_features": {"name": "replaced_features"},
}
STAGES = get_args(Stage)


@cache
def log():
    return Log(NUM_ROWS)


def config_of(name, **objective):
    return model_config(objective={**OBJECTIVES[name], **objective})


class Case:
    """A corrupted batch with random vectors, which tell where they come from, and the losses of its heads."""

    def __init__(self, name, batch=None, **objective):
        torch.manual_seed(0)
        self.batch = batch or log().batch()
        self.noise = RowNoise(self.batch, len(TOKENS))
        self.clean = _vectors_of_values(self.batch)
        self.hidden = torch.randn(self.batch.num_rows, len(TOKENS) + 1, DIM)
        config = config_of(name, **objective)
        self.heads, self.corruption = make_objective(WITH_ITEM, log().statistics, config)
        self.corrupted = self.corruption(self.clean, self.batch, self.noise)

    @property
    def changed(self):
        return (self.corrupted.tokens != self.clean).any(-1)

    @property
    def known(self):
        return self.batch.ids >= NUM_RESERVED_IDS

    def losses(self):
        return self.heads(self.hidden, self.clean, self.batch, self.corrupted, self.noise)


def _vectors_of_values(batch):
    """[B, T, D]: one vector for each value of a field, as a table has."""
    table = torch.randn(len(TOKENS), 60, DIM, generator=torch.Generator().manual_seed(1))
    return table[torch.arange(len(TOKENS)), batch.ids.clamp(min=0)].clone()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_denoiser_sees_no_label_and_the_noise_level_of_scoring(name):
    corrupted = Case(name).corrupted
    assert (corrupted.label_ids == LABEL_MASK_ID).all()
    assert (corrupted.noise_level == 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_is_left_alone_and_no_target(name):
    case = Case(name, log().batch(0, 50, padding=9))
    absent = case.batch.ids < 0
    assert not case.changed[absent].any()
    assert not case.corrupted.is_target[absent].any()
    assert not case.losses().is_target[50:].any()


@pytest.mark.parametrize("name", ["next_item", "masked_features"])
def test_cells_are_chosen_alike_in_whatever_batch_a_row_stands(name):
    index = [40, 3, 17]
    alone, among = Case(name, log().rows(index)), Case(name)
    assert torch.equal(alone.changed, among.changed[index])


def test_the_next_item_hides_what_it_must_in_clicked_rows_and_nothing_else():
    case = Case("next_item")
    hidden_columns = [column("item"), column("place")]
    expected = torch.zeros_like(case.changed)
    expected[:, hidden_columns] = (case.batch.labels == 1)[:, None]
    assert torch.equal(case.changed, expected)
    assert expected.any()
    assert torch.equal(case.corrupted.is_target, expected & case.known)
    masks = case.corruption.mask_vectors
    clicked = case.batch.labels == 1
    for place, mask in zip(hidden_columns, masks, strict=True):
        assert (case.corrupted.tokens[clicked, place] == mask).all()


@pytest.mark.parametrize("full_softmax_max", [8, 1000])
def test_the_next_item_is_predicted_alone(full_softmax_max):
    model = config_of("next_item")
    model = model.model_copy(
        update={
            "reconstruction": model.reconstruction.model_copy(update={"full_softmax_max": full_softmax_max})
        }
    )
    heads, _ = make_objective(WITH_ITEM, log().statistics, model)
    assert heads.fields == ["item"]
    assert (heads.full is not None) == (full_softmax_max == 1000)


@pytest.mark.parametrize(
    ("eligible", "share", "chosen"),
    [(10, 0.3, 3), (10, 0.1, 1), (10, 0.01, 1), (10, 0.99, 10), (7, 0.5, 4), (1, 0.1, 1), (0, 0.5, 0)],
)
def test_a_share_of_a_row_is_rounded_but_not_to_nothing(eligible, share, chosen):
    may = torch.zeros(5, 12, dtype=torch.bool)
    may[:, :eligible] = True
    picked = choose_share(torch.rand(5, 12), may, share)
    assert picked.sum(1).tolist() == [chosen] * 5
    assert not (picked & ~may).any()


def test_all_cells_of_a_row_are_chosen_equally_often():
    may = torch.tensor([True, False, True, True, False, True]).expand(20_000, -1)
    picked = choose_share(torch.rand(20_000, 6), may, 0.5).float().mean(0)
    torch.testing.assert_close(picked, 0.5 * may[0].float(), atol=0.02, rtol=0)


def test_masked_features_are_a_share_of_what_a_row_has():
    case = Case("masked_features", share=0.4)
    present = case.batch.ids >= 0
    expected = (0.4 * present.sum(1)).round().clamp(min=1)
    assert torch.equal(case.changed.sum(1).float(), expected)
    assert not (case.changed & ~present).any()
    assert torch.equal(case.corrupted.is_target, case.changed & case.known)
    masks = case.corruption.mask_tokens.expand_as(case.clean)
    assert torch.equal(case.corrupted.tokens[case.changed], masks[case.changed])


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 12))
def test_draws_are_real_rows_and_every_row_gives_as_often(is_padding, number):
    drawn = drawn_rows(torch.tensor(is_padding), number)
    assert drawn.shape == (math.ceil(len(is_padding) / number), number)
    real = [row for row, padding in enumerate(is_padding) if not padding]
    if real:
        counts = Counter(drawn.flatten().tolist())
        assert set(counts) <= set(real)
        assert max(counts.values()) - min(counts[row] for row in real) <= 1 + len(is_padding) // len(real)


def slow_contrast(case, index, places):
    """Losses of one field by a loop over rows and draws."""
    head, ids = case.heads, case.batch.ids
    drawn = drawn_rows(case.noise.is_padding, head.num_negatives)
    losses = torch.zeros(case.batch.num_rows)
    for b, place in enumerate(places):
        if not case.corrupted.is_target[b, place]:
            continue
        query = case.hidden[b, place] @ head.query[index]

        def score(row, query=query):
            return query @ case.clean[row, places[row]] + head.bias[index]

        block = drawn[b // head.num_negatives].tolist()
        draws = [row for row in block if row != b and ids[row, places[row]] >= NUM_RESERVED_IDS]
        odds = torch.stack([score(row).exp() / len(draws) for row in [b, *draws]])
        of_truth = odds / (1 + odds)
        losses[b] = -of_truth[0].log() - (1 - of_truth[1:]).log().sum()
    return losses


@torch.no_grad()
@pytest.mark.parametrize("num_negatives", [5, 10, 100])
def test_noise_contrast_equals_the_reference(num_negatives):
    batch = log().batch()
    batch.row_ids[[3, 50, 63]] = -1
    batch.ids[[3, 50, 63]] = -1
    case = Case("masked_features", batch, share=0.5, num_negatives=num_negatives)
    case.heads.bias.uniform_(-1, 1)
    case.heads.query.normal_(std=0.1)
    losses = case.losses()
    picks = case.heads.picked_tokens(batch, case.corrupted, case.noise)
    assert case.heads.fields == list(SCHEMA.field_names)
    for index in range(len(case.heads.fields)):
        expected = slow_contrast(case, index, picks[:, index].tolist())
        assert (expected > 0).any()
        torch.testing.assert_close(losses.loss[:, index], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(losses.is_target[:, index], expected > 0)


@torch.no_grad()
def test_a_model_that_knows_the_frequencies_alone_is_at_the_chance_of_noise_contrast():
    case = Case("masked_features", num_negatives=10)
    case.heads.query.zero_()
    losses = case.losses()
    assert not case.known.all()  # rows without a value have no draws that could count
    torch.testing.assert_close(losses.loss.sum(0) / losses.is_target.sum(0), losses.chance)
    most = math.log(11) + 10 * math.log(1.1)
    torch.testing.assert_close(losses.loss.max(), torch.tensor(most))


def test_without_draws_there_is_nothing_to_tell_apart():
    case = Case("masked_features", log().rows([5]))
    losses = case.losses()
    assert case.corrupted.is_target.any()
    assert not losses.is_target.any()
    assert (losses.loss == 0).all()
    assert losses.chance.isfinite().all()


def test_replaced_features_take_known_values_of_the_same_field_from_other_rows():
    case = Case("replaced_features", share=0.4)
    assert torch.equal(case.corrupted.is_target, case.known)
    assert not (case.changed & ~case.known).any()
    expected = (0.4 * case.known.sum(1)).round()
    assert (case.changed.sum(1) <= expected.clamp(min=1)).all()
    assert case.changed.sum() > 0.5 * expected.sum()
    for place in range(len(TOKENS)):
        values = case.clean[case.known[:, place], place]
        for token in case.corrupted.tokens[case.changed[:, place], place]:
            assert (values == token).all(1).any()


def test_fields_that_are_not_judged_are_not_replaced():
    described = SCHEMA.model_dump(mode="json")
    described["fields"][SCHEMA.field_names.index("user")]["reconstruct"] = False
    schema, batch = Schema.model_validate(described), log().batch()
    heads, corruption = make_objective(schema, log().statistics, config_of("replaced_features"))
    clean = _vectors_of_values(batch)
    corrupted = corruption(clean, batch, RowNoise(batch, len(TOKENS)))
    assert "user" not in heads.fields
    assert torch.equal(corrupted.tokens[:, column("user")], clean[:, column("user")])
    assert not corrupted.is_target[:, column("user")].any()


@torch.no_grad()
def test_detection_is_a_logistic_regression_on_what_changed():
    case = Case("replaced_features")
    case.heads.weight.normal_()
    case.heads.bias.normal_()
    losses = case.losses()
    for index, name in enumerate(case.heads.fields):
        places = range(HISTORY.start, HISTORY.stop) if name == "history" else [column(name)]
        for b in range(NUM_ROWS):
            judged = [p for p in places if case.known[b, p]]
            assert bool(losses.is_target[b, index]) == bool(judged)
            logits = [case.hidden[b, p] @ case.heads.weight[index] + case.heads.bias[index] for p in judged]
            signs = [1.0 if case.changed[b, p] else -1.0 for p in judged]
            terms = [-functional.logsigmoid(s * z) for s, z in zip(signs, logits, strict=True)]
            expected = torch.stack(terms).mean() if terms else torch.tensor(0.0)
            torch.testing.assert_close(losses.loss[b, index], expected, rtol=1e-4, atol=1e-5)


def test_a_value_replaced_by_its_like_is_its_own():
    batch = log().batch()
    batch.ids[:, column("hour")] = NUM_RESERVED_IDS
    case = Case("replaced_features", batch, share=0.9)
    assert not case.changed[:, column("hour")].any()
    assert case.corrupted.is_target[:, column("hour")].all()


def test_detection_starts_at_chance_and_is_held_against_the_share():
    losses = Case("replaced_features", share=0.1).losses()
    torch.testing.assert_close(losses.loss[losses.is_target].mean(), torch.tensor(math.log(2)))
    torch.testing.assert_close(losses.chance, torch.full_like(losses.chance, math.log(2)))
    entropy = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    torch.testing.assert_close(losses.baseline, torch.full_like(losses.chance, entropy))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_its_terms_and_trains_what_it_needs(name, stage):
    model = make_model(log(), stage, config_of(name), WITH_ITEM, table_l2=0.1)
    loss, outputs = model(log().batch())
    loss.backward()
    terms = {"table_l2"}
    terms |= {"generative", "calibration"} if stage in ("pretrain", "joint") else set()
    terms |= {"click"} if stage != "pretrain" else set()
    assert set(outputs.terms) == terms
    missed = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missed == []


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("stage", ["pretrain", "joint"])
def test_padding_rows_do_not_count(name, stage):
    def terms(padding):  # by a new model, as the scalars move with every batch
        return make_model(log(), stage, config_of(name), WITH_ITEM)(log().batch(padding=padding))[1].terms

    plain, padded = terms(0), terms(9)
    for key, term in plain.items():
        torch.testing.assert_close(padded[key], term, msg=key)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_but_padding_trains_nothing(name):
    model = make_model(log(), "pretrain", config_of(name), WITH_ITEM)
    batch = log().batch(0, 0, padding=8)
    loss, outputs = model(batch)
    loss.backward()
    assert all(term.isfinite() for term in outputs.terms.values())
    moved = [key for key, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()]
    assert moved == []


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_lowers_the_loss(name):
    model = make_model(log(), "pretrain", config_of(name), WITH_ITEM)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for step in range(80):
        optimizer.zero_grad()
        loss, outputs = model(log().batch(noise_seed=step % 4))
        loss.backward()
        optimizer.step()
        losses.append(outputs.fields.relative.mean().item())
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])


@pytest.mark.parametrize(
    ("name", "trained"), [("next_item", False), ("masked_features", True), ("replaced_features", False)]
)
def test_mask_vectors_stand_for_dropped_cells_only_where_all_fields_are_masked(name, trained):
    network = make_model(log(), "finetune", config_of(name), WITH_ITEM).network
    assert (network.mask_tokens is not None) == trained


@pytest.mark.parametrize(
    ("name", "grown", "refused"),
    [
        ("next_item", {"item": 1000}, True),
        ("next_item", {"hour": 1000}, False),
        ("masked_features", {"hour": 1000}, False),
        ("replaced_features", {"hour": 1000}, False),
    ],
)
def test_growth_is_refused_only_where_a_head_would_change(name, grown, refused):
    model = config_of(name)
    heads = model.reconstruction.model_copy(update={"full_softmax_max": 100})
    model = model.model_copy(update={"reconstruction": heads})
    before = {field.name: log().statistics.table_rows(field.name) for field in SCHEMA.table_owners}
    if refused:
        with pytest.raises(ValueError, match="'item': its table has grown from 40 to"):
            check_growth(WITH_ITEM, before, {**before, **grown}, model)
    else:
        check_growth(WITH_ITEM, before, {**before, **grown}, model)
