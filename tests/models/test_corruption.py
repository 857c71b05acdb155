"""The forward process: which cells are noised, by what, and what of them is a target."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_log import FULL, HISTORY, LENGTH, SCHEMA, TOKENS, Log, column, corrupt, model_config

from hetegen_rec.config.schema import NUM_RESERVED_IDS
from hetegen_rec.models.corruption import LABEL_MASK_ID, Diffusion, RowNoise

T_MIN = 0.05
SINGLE = [i for i, token in enumerate(SCHEMA.tokens) if token.field != "history"]


@cache
def log():
    return Log(2000)


@cache
def tokens():
    """Looked-up rows that tell where they come from: (row, column, noise)."""
    rows = torch.randn(2000, len(TOKENS), 3, generator=torch.Generator().manual_seed(0))
    rows[..., 0] = torch.arange(2000)[:, None] + 1.0
    rows[..., 1] = torch.arange(len(TOKENS)) + 1.0
    return rows


def noised(corrupted, clean):
    return (corrupted.tokens != clean).any(-1)


@cache
def masked():
    return corrupt(log(), tokens())


@given(st.lists(st.integers(0, 1999), min_size=1, max_size=30))
def test_a_row_is_noised_alike_in_whatever_batch_it_stands(index):
    alone = corrupt(log(), tokens()[index], log().rows(index))
    torch.testing.assert_close(alone.noise_level, masked().noise_level[index])
    assert torch.equal(alone.is_target, masked().is_target[index])
    assert torch.equal(alone.label_ids, masked().label_ids[index])
    assert torch.equal(noised(alone, tokens()[index]), noised(masked(), tokens())[index])


@given(st.integers(1, 1999))
def test_the_split_of_a_global_batch_over_ranks_does_not_change_its_noise(cut):
    parts = [
        corrupt(log(), tokens()[start:stop], log().batch(start, stop))
        for start, stop in ((0, cut), (cut, 2000))
    ]
    assert torch.equal(torch.cat([part.is_target for part in parts]), masked().is_target)
    assert torch.equal(torch.cat([part.label_ids for part in parts]), masked().label_ids)
    torch.testing.assert_close(torch.cat([part.noise_level for part in parts]), masked().noise_level)


def test_every_epoch_noises_a_row_anew():
    other = corrupt(log(), tokens(), log().batch(noise_seed=2))
    share = (noised(other, tokens()) != noised(masked(), tokens()))[:, SINGLE].float().mean()
    assert share > 0.2


def test_tokens_and_purposes_draw_independently():
    noise = RowNoise(log().batch(), len(TOKENS))
    columns = torch.cat([noise.cells(stream) for stream in range(4)], dim=1).double()
    correlation = torch.corrcoef(columns.T) - torch.eye(columns.shape[1])
    assert correlation.abs().max() < 0.12
    assert columns.min() >= 0
    assert columns.max() < 1


def test_cells_are_noised_with_the_probability_of_their_rows_level():
    level = masked().noise_level
    hit = noised(masked(), tokens())[:, SINGLE].float().mean(1)
    for lower in (0.0, 0.2, 0.4, 0.6, 0.8):
        rows = (level >= lower) & (level < lower + 0.2)
        assert hit[rows].mean().item() == pytest.approx(level[rows].mean().item(), abs=0.04)


def test_items_of_a_sequence_are_noised_one_by_one_with_the_level():
    free = corrupt(log(), tokens(), whole_sequence=0.0)
    present = log().batch().ids[:, HISTORY] >= 0
    hit = noised(free, tokens())[:, HISTORY]
    expected = free.noise_level[:, None].expand_as(hit)[present].mean().item()
    assert hit[present].float().mean().item() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("step", [0, 1, 17])
def test_levels_are_stratified_over_the_global_batch(step):
    level = RowNoise(log().batch(step=step), len(TOKENS)).levels(T_MIN)
    assert level.min() >= T_MIN
    assert level.max() <= 1.0
    place = (level.double() - T_MIN) / (1 - T_MIN) * len(level)
    gaps = place.sort().values.diff()
    torch.testing.assert_close(gaps, torch.ones_like(gaps), atol=0.01, rtol=0)


def test_steps_shift_the_levels():
    first, second = (RowNoise(log().batch(step=step), len(TOKENS)).levels(T_MIN) for step in (0, 512))
    assert (first - second).abs().min() > 1e-4


def test_padding_is_never_noised():
    batch = log().batch(0, 50, padding=9)
    clean = torch.randn(59, len(TOKENS), 3)
    corrupted = corrupt(log(), clean, batch, whole_sequence=1.0)
    absent = batch.ids < 0
    assert absent[:50].any()
    assert absent[50:].all()
    assert not noised(corrupted, clean)[absent].any()
    assert not corrupted.is_target[absent].any()


def test_missing_and_unknown_ids_are_noised_but_never_targets():
    ids = log().batch().ids
    reserved = (ids >= 0) & (ids < NUM_RESERVED_IDS)
    hit = noised(masked(), tokens())
    assert hit[reserved].any()
    assert not masked().is_target[reserved].any()
    assert torch.equal(masked().is_target, hit & (ids >= NUM_RESERVED_IDS))


def test_other_cells_keep_their_rows_and_noised_ones_get_the_mask_vector_of_their_field():
    batch = log().batch()
    corruption = Diffusion(SCHEMA, model_config().noise, 3, swappable=FULL)
    corrupted = corruption(tokens(), batch, RowNoise(batch, len(TOKENS)))
    fields = [SCHEMA.field_names.index(token.field) for token in SCHEMA.tokens]
    mask_vectors = corruption.mask_vectors.detach()[fields].expand_as(tokens())
    is_mask = (corrupted.tokens == mask_vectors).all(-1)
    is_clean = (corrupted.tokens == tokens()).all(-1)
    assert (is_mask ^ is_clean).all()
    assert (is_mask | ~corrupted.is_target).all()
    assert corruption.mask_vectors.unique(dim=0).shape[0] == len(SCHEMA.fields)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_sequences_are_masked_as_a_whole_with_their_probability(probability):
    corrupted = corrupt(log(), tokens(), whole_sequence=probability)
    full = (log().batch().ids[:, HISTORY] >= 0).all(1)
    whole = noised(corrupted, tokens())[full][:, HISTORY].all(1).float().mean().item()
    by_item = corrupted.noise_level[full].pow(LENGTH).mean().item()
    assert whole == pytest.approx(probability + (1 - probability) * by_item, abs=0.06)


def test_marginal_noise_takes_the_value_of_another_row_of_the_same_field():
    corrupted = corrupt(log(), tokens(), kind="marginal", marginal_fraction=1.0)
    hit = noised(masked(), tokens())
    for name in FULL:
        place = column(name)
        taken = corrupted.tokens[hit[:, place], place]
        source = taken[:, 0].long() - 1
        assert torch.equal(taken, tokens()[source, place])
        assert len(source.unique()) == len(source)
        own = torch.arange(2000)[hit[:, place]]
        assert (source == own).float().mean() < 0.01
    assert torch.equal(corrupted.is_target, masked().is_target)


@pytest.mark.parametrize("padding", [slice(40, 60), slice(0, 60, 3)], ids=["behind", "among"])
def test_marginal_noise_takes_nothing_from_padding(padding):
    batch = log().rows([*range(60)])
    batch.row_ids[padding] = -1
    batch.ids[padding] = -1
    corrupted = corrupt(log(), tokens()[:60], batch, kind="marginal", marginal_fraction=1.0)
    hit = noised(corrupted, tokens()[:60])
    for name in FULL:
        place = column(name)
        source = corrupted.tokens[hit[:, place], place, 0].long() - 1
        assert len(source.unique()) == len(source) > 5
        assert (batch.row_ids[source] >= 0).all()


def test_marginal_noise_swaps_its_share_and_masks_the_rest():
    corrupted = corrupt(log(), tokens(), kind="marginal", marginal_fraction=0.3)
    hit = noised(masked(), tokens())
    swapped = hit & (corrupted.tokens[..., 1] == tokens()[..., 1])
    shares = {key: swapped[:, column(key)].sum().item() / hit[:, column(key)].sum().item() for key in TOKENS}
    for key, share in shares.items():
        assert share == (pytest.approx(0.3, abs=0.06) if key in FULL else 0.0)


def test_the_label_is_masked_with_the_level_and_clean_otherwise():
    labels = masked().label_ids
    is_masked = labels == LABEL_MASK_ID
    expected = masked().noise_level.mean().item()
    assert is_masked.float().mean().item() == pytest.approx(expected, abs=0.04)
    high = masked().noise_level > 0.8
    assert is_masked[high].float().mean() > 0.8
    assert torch.equal(labels[~is_masked], log().batch().labels.long()[~is_masked])


def test_a_label_outside_the_set_is_always_masked():
    assert (corrupt(log(), tokens(), label_in_set=False).label_ids == LABEL_MASK_ID).all()


def test_whether_the_label_is_masked_says_nothing_about_the_tokens():
    middle = (masked().noise_level - 0.5).abs() < 0.2
    hit = noised(masked(), tokens())[middle][:, SINGLE]
    label = (masked().label_ids == LABEL_MASK_ID)[middle]
    agreement = (hit == label[:, None]).float().mean(0)
    torch.testing.assert_close(agreement, torch.full_like(agreement, 0.5), atol=0.1, rtol=0)
