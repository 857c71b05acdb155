import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetegen_rec.config.balance import BalanceConfig
from hetegen_rec.models.balancing import FORMS, make_difficulty
from hetegen_rec.models.difficulty import FieldLosses, Probe

CONSERVING = sorted(set(FORMS) - {"literal", "uncertainty"})


def field_losses(cross_entropy, chance=None, share=None, baseline=None):
    values = torch.as_tensor(cross_entropy, dtype=torch.float32)
    values = values[:, None] if values.ndim == 1 else values
    chances = torch.ones(len(values)) if chance is None else torch.as_tensor(chance)
    return FieldLosses(
        cross_entropy=values,
        share=torch.full_like(values, 1 / values.shape[1]) if share is None else torch.as_tensor(share),
        chance=chances,
        baseline=chances if baseline is None else torch.as_tensor(baseline),
    )


def calibrate(difficulty, losses, steps=150, lr=0.2, probe=None):
    optimizer = torch.optim.SGD(difficulty.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        difficulty.calibration(losses).backward()
        optimizer.step()
        difficulty.observe(losses, probe)
    return difficulty


losses_strategy = st.lists(st.floats(0.01, 5.0), min_size=2, max_size=6)


@given(losses_strategy)
def test_equilibrium_is_log_of_the_relative_loss(values):
    difficulty = calibrate(
        make_difficulty(len(values), BalanceConfig(form="difficulty")), field_losses(values)
    )
    expected = torch.log(torch.tensor(values) + 1e-3)
    torch.testing.assert_close(difficulty.difficulty[:, 0].detach(), expected, atol=1e-3, rtol=1e-3)


@given(losses_strategy)
def test_frozen_network_lyapunov_function_only_falls(values):
    losses = field_losses(values)
    difficulty = make_difficulty(len(values), BalanceConfig(form="difficulty"))
    optimizer = torch.optim.SGD(difficulty.parameters(), lr=0.05)
    target = torch.log(losses.relative)
    before = math.inf
    for _ in range(50):
        gap = difficulty.difficulty.detach() - target
        height = float((torch.exp(-gap) + gap - 1).sum())
        assert height <= before + 1e-5
        before = height
        optimizer.zero_grad()
        difficulty.calibration(losses).backward()
        optimizer.step()


@pytest.mark.parametrize(("form", "factor"), [("difficulty", 1.0), ("informative", 1.0), ("literal", 2.0)])
def test_the_exponential_is_a_moving_average_even_of_a_loss_that_jumps(form, factor):
    """A solved field that meets one hard batch is not thrown far up for hundreds of steps."""
    config = BalanceConfig(form=form)
    difficulty, average = make_difficulty(1, config), 1.0
    for loss in (*[0.004] * 200, 1.5, 0.004):
        losses = field_losses([loss])
        level = losses.cross_entropy if form == "literal" else losses.relative
        average = 0.95 * average + 0.05 * factor * level.item()
        calibrate(difficulty, losses, 1, lr=config.learning_rate)
        assert difficulty.scalars.exp().item() == pytest.approx(average, rel=1e-4)


@pytest.mark.parametrize("form", CONSERVING)
def test_weights_keep_the_budget(form):
    losses = field_losses([[0.2], [0.9], [2.0]])
    if form == "conditional":
        losses = field_losses(torch.tensor([[0.2], [0.9], [2.0]]).repeat(1, 4))
    probe = Probe(torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.5, -0.2, 0.9]))
    difficulty = calibrate(make_difficulty(3, BalanceConfig(form=form)), losses, probe=probe)
    assert difficulty.over_targets(difficulty.weights()).mean().item() == pytest.approx(1.0, abs=1e-5)
    assert (difficulty.weights() > 0).all()


def test_conditional_keeps_the_budget_where_targets_are_as_noise_makes_them():
    """At noise level t a share t of the cells are targets; every level comes equally often."""
    losses = field_losses([[0.1, 0.4, 0.8, 1.0], [0.9, 0.9, 0.9, 0.9]])
    weights = calibrate(make_difficulty(2, BalanceConfig(form="conditional")), losses).weights()
    level = torch.linspace(0, 1, 40_001)[:-1]
    spent = (weights[:, (level * 4).long()] * level).sum(1) / level.sum()
    assert spent.mean().item() == pytest.approx(1.0, abs=1e-3)


@given(losses_strategy, st.floats(0.1, 10.0))
def test_weights_do_not_change_when_all_losses_are_scaled(values, scale):
    plain, scaled = (make_difficulty(len(values), BalanceConfig(form="difficulty")) for _ in range(2))
    with torch.no_grad():
        plain.difficulty.copy_(torch.log(torch.tensor(values))[:, None])
        scaled.difficulty.copy_(torch.log(torch.tensor(values) * scale)[:, None])
    torch.testing.assert_close(plain.weights(), scaled.weights(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("exponent", "sign"), [(1.0, 1), (-1.0, -1), (0.0, 0)])
def test_exponent_gives_the_direction_of_the_weights(exponent, sign):
    config = BalanceConfig(form="difficulty", exponent=exponent)
    easy_hard = calibrate(make_difficulty(2, config), field_losses([0.2, 0.8])).weights()[:, 0]
    assert torch.sign((easy_hard[1] - easy_hard[0]).round(decimals=4)).item() == sign


def test_weights_are_the_relative_losses_over_their_mean_for_exponent_one():
    weights = calibrate(
        make_difficulty(3, BalanceConfig(form="difficulty")), field_losses([0.2, 0.8, 0.5])
    ).weights()
    torch.testing.assert_close(weights[:, 0], torch.tensor([0.4, 1.6, 1.0]), atol=0.01, rtol=0.01)


def test_a_solved_field_loses_its_weight_smoothly():
    weights = [
        calibrate(make_difficulty(2, BalanceConfig(form="difficulty")), field_losses([loss, 1.0]))
        .weights()[0]
        .item()
        for loss in (0.1, 0.01, 0.0)
    ]
    assert weights[0] > weights[1] > weights[2]
    assert weights[2] < 0.01


@pytest.mark.parametrize("form", ["literal", "uncertainty"])
def test_the_literal_form_lowers_the_weight_of_hard_fields(form):
    difficulty = calibrate(make_difficulty(2, BalanceConfig(form=form)), field_losses([0.5, 2.0]))
    torch.testing.assert_close(difficulty.weights()[:, 0], torch.tensor([1.0, 0.25]), atol=1e-3, rtol=1e-3)


def test_informative_prefers_neither_the_solved_nor_the_unlearnable_field():
    losses = field_losses([0.01, 0.5, 1.0], baseline=[1.0, 1.0, 1.0])
    weights = calibrate(make_difficulty(3, BalanceConfig(form="informative")), losses).weights()[:, 0]
    assert weights[1] > 2 * weights[0]
    assert weights[1] > 2 * weights[2]


def test_informative_moves_a_nearly_constant_field_no_faster_than_the_others():
    losses = field_losses([3.0, 3.0], baseline=[1e-3, 1.0])
    config = BalanceConfig(form="informative", learning_rate=0.01)
    difficulty = calibrate(make_difficulty(2, config), losses, 1, lr=0.01)
    torch.testing.assert_close(difficulty.scalars, torch.full((2, 1), math.log1p(0.01)))


def test_informative_takes_a_loss_that_varies_around_the_entropy_as_unlearnable():
    difficulty = make_difficulty(1, BalanceConfig(form="informative"))
    for loss in (0.7, 1.3) * 500:
        calibrate(difficulty, field_losses([loss], baseline=[1.0]), 1, lr=0.01)
    assert difficulty.scalars.item() == pytest.approx(0.0, abs=0.01)


def learnable_after(*losses, lr=0.05):
    """The form after two hundred steps through so many losses of every field, all with an entropy of 1."""
    difficulty = make_difficulty(len(losses[0]), BalanceConfig(form="learnable", learning_rate=lr))
    for step in range(200):
        calibrate(difficulty, field_losses(losses[step % len(losses)]), 1, lr=lr)
    return difficulty


def test_learnable_prefers_the_hardest_field_that_beats_its_entropy_and_leaves_noise_the_least():
    easy, hard, noise = learnable_after([0.31, 0.95, 1.01], [0.29, 0.97, 0.999]).weights()[:, 0].tolist()
    assert hard > 3 * easy
    assert easy > 2 * noise
    assert hard == pytest.approx(10 * 0.96 / 1.005 * noise, rel=0.02)  # the floor is a tenth


def test_learnable_asks_for_a_margin_that_is_no_chance():
    sure, unsure = learnable_after([0.98, 0.68], [1.00, 1.30]).probability().tolist()
    assert sure > 0.99
    assert 0.3 < unsure < 0.7


def test_learnable_is_difficulty_until_a_field_has_shown_something():
    difficulty = learnable_after([2.0, 1.5], [1.9, 1.4])
    plain = make_difficulty(2, BalanceConfig(form="difficulty"))
    plain.load_state_dict({"difficulty": difficulty.scalars})
    torch.testing.assert_close(difficulty.weights(), plain.weights())
    start = make_difficulty(2, BalanceConfig(form="learnable"))
    torch.testing.assert_close(start.probability(), torch.full((2,), 0.5))
    torch.testing.assert_close(start.weights(), torch.ones(2, 1))


def test_learnable_learns_nothing_from_a_field_without_targets():
    difficulty = make_difficulty(2, BalanceConfig(form="learnable"))
    for _ in range(50):
        difficulty.observe(field_losses([0.5, 0.0], share=[[1.0], [0.0]]), None)
    assert difficulty.probability()[0] > 0.99
    assert difficulty.probability()[1] == 0.5


def test_progress_prefers_the_field_that_is_still_being_learnt():
    difficulty = make_difficulty(2, BalanceConfig(form="progress"))
    for step in range(100):
        difficulty.observe(field_losses([1.0, 1.0 - step / 200]), None)
    weights = difficulty.weights()[:, 0]
    assert weights[1] > 3 * weights[0]


def test_dwa_weighs_up_the_field_whose_loss_fell_less_over_the_last_windows():
    difficulty = make_difficulty(2, BalanceConfig(form="dwa"))
    for loss in (1.0, 0.5):
        for _ in range(100):
            difficulty.observe(field_losses([0.9, loss]), None)
    weights = difficulty.weights()[:, 0]
    ratio = torch.exp(torch.tensor([1.0, (0.5 + 1e-3) / (1.0 + 1e-3)]) / 2.0)
    torch.testing.assert_close(weights, ratio / ratio.mean(), atol=1e-4, rtol=1e-4)


def test_aligned_weighs_up_the_field_that_helps_clicks():
    difficulty = make_difficulty(2, BalanceConfig(form="aligned"))
    for _ in range(50):
        difficulty.observe(field_losses([1.0, 1.0]), Probe(torch.ones(2), torch.tensor([0.8, -0.5])))
    weights = difficulty.weights()[:, 0]
    assert weights[0] > 4 * weights[1] > 0


def test_gradnorm_evens_out_the_gradient_norms():
    difficulty = make_difficulty(2, BalanceConfig(form="gradnorm"))
    probe = Probe(torch.tensor([4.0, 1.0]), torch.ones(2))
    for _ in range(100):
        difficulty.observe(field_losses([1.0, 1.0]), probe)
    calibrate(difficulty, field_losses([1.0, 1.0]), 300, lr=0.02, probe=probe)
    weighted = difficulty.weights()[:, 0] * probe.norms
    assert weighted[0].item() == pytest.approx(weighted[1].item(), rel=0.15)


@pytest.mark.parametrize("form", ["aligned", "gradnorm"])
def test_a_field_that_is_seldom_seen_gets_the_weight_of_its_equals(form):
    probe = Probe(torch.tensor([1.0, 1.0, 0.5]), torch.tensor([0.8, 0.8, 0.2]))
    unseen = Probe(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.8, 0.0, 0.2]))
    difficulty = make_difficulty(3, BalanceConfig(form=form))
    for step in range(1000):
        is_seen = step % 5 == 0
        losses = field_losses([0.5, 0.5 * is_seen, 0.5], share=[[1.0], [float(is_seen)], [1.0]])
        calibrate(difficulty, losses, 1, lr=0.02, probe=probe if is_seen else unseen)
    weights = difficulty.weights()[:, 0]
    assert weights[1].item() == pytest.approx(weights[0].item(), rel=0.1)


def test_conditional_tells_noise_levels_apart():
    losses = field_losses([[0.1, 0.4, 0.8, 1.0], [0.9, 0.9, 0.9, 0.9]])
    weights = calibrate(make_difficulty(2, BalanceConfig(form="conditional")), losses).weights()
    assert (weights[0].diff() > 0).all()


def test_a_field_without_targets_keeps_its_difficulty():
    losses = field_losses([0.5, 0.0], share=[[1.0], [0.0]])
    difficulty = calibrate(make_difficulty(2, BalanceConfig(form="difficulty")), losses, 50)
    assert difficulty.difficulty[1].item() == 0.0
    assert difficulty.difficulty[0].item() < -0.1


def test_gain_is_one_at_the_start_and_the_root_of_the_weight_later():
    difficulty = make_difficulty(2, BalanceConfig(form="difficulty"))
    torch.testing.assert_close(difficulty.gain(), torch.ones(2))
    calibrate(difficulty, field_losses([0.2, 0.8]))
    torch.testing.assert_close(difficulty.gain().square(), difficulty.weights()[:, 0])
    assert not difficulty.gain().requires_grad


def test_calibration_never_reaches_the_network():
    raw = torch.tensor([[0.5], [0.7]], requires_grad=True)
    losses = FieldLosses(raw, torch.ones(2, 1), torch.ones(2), torch.ones(2))
    for form in FORMS:
        if form == "conditional":
            continue
        calibration = make_difficulty(2, BalanceConfig(form=form)).calibration(losses)
        assert torch.autograd.grad(calibration, raw, allow_unused=True)[0] is None
