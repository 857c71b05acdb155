"""What the denoiser's hidden vectors depend on."""

import pytest
import torch

from hetegen_rec.config.run import DenoiserConfig
from hetegen_rec.models.attention import Guidance
from hetegen_rec.models.corruption import LABEL_MASK_ID
from hetegen_rec.models.denoiser import Denoiser

ROWS, NUM_TOKENS, DIM = 4, 3, 8
NEUTRAL = Guidance(torch.ones(NUM_TOKENS + 1), torch.zeros(NUM_TOKENS + 1))


def denoiser(num_layers=2):
    torch.manual_seed(0)
    return Denoiser(NUM_TOKENS, DIM, DenoiserConfig(num_layers=num_layers))


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return {
        "tokens": torch.randn(ROWS, NUM_TOKENS, DIM),
        "label_ids": torch.tensor([0, 1, LABEL_MASK_ID, 0]),
        "noise_level": torch.tensor([0.1, 0.5, 0.9, 0.0]),
        "guidance": NEUTRAL,
        "padding": None,
    }


def test_the_label_is_the_last_element_and_every_other_attends_to_it(inputs):
    hidden = denoiser()(**inputs)
    assert hidden.shape == (ROWS, NUM_TOKENS + 1, DIM)
    flipped = denoiser()(**{**inputs, "label_ids": 1 - inputs["label_ids"].clamp(max=1)})
    change = (hidden - flipped).abs().amax(-1)
    assert (change > 1e-5).all()
    without_attention = denoiser(num_layers=0)
    plain = without_attention(**inputs)
    flipped = without_attention(**{**inputs, "label_ids": torch.ones(ROWS, dtype=torch.long)})
    assert torch.equal(plain[:, :-1], flipped[:, :-1])
    assert not torch.equal(plain[:, -1], flipped[:, -1])


def test_the_noise_level_is_seen(inputs):
    other = denoiser()(**{**inputs, "noise_level": inputs["noise_level"] + 0.05})
    assert ((denoiser()(**inputs) - other).abs().amax((1, 2)) > 1e-4).all()


def test_equal_tokens_are_told_apart_by_their_place(inputs):
    same = inputs["tokens"][:, :1].expand(-1, NUM_TOKENS, -1)
    hidden = denoiser()(**{**inputs, "tokens": same})
    assert ((hidden[:, 0] - hidden[:, 1]).abs().amax(-1) > 1e-4).all()


def test_rows_do_not_see_each_other(inputs):
    whole = denoiser()(**inputs)
    one = {
        key: value[1:2] if key in ("tokens", "label_ids", "noise_level") else value
        for key, value in inputs.items()
    }
    torch.testing.assert_close(whole[1:2], denoiser()(**one))


def test_padding_does_not_reach_other_elements(inputs):
    padding = torch.zeros(ROWS, NUM_TOKENS + 1, dtype=torch.bool)
    padding[:, 1] = True
    before = denoiser()(**{**inputs, "padding": padding})
    inputs["tokens"][:, 1] = 100.0
    after = denoiser()(**{**inputs, "padding": padding})
    torch.testing.assert_close(before[:, [0, 2, 3]], after[:, [0, 2, 3]])


@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_all_elements_share_the_weight_on_which_gradients_are_compared(num_layers, inputs):
    model = denoiser(num_layers)
    hidden = model(**inputs)
    for element in range(NUM_TOKENS + 1):
        # The hidden vectors are normalised, so their plain sum is constant.
        loss = hidden[:, element].pow(3).sum()
        (gradient,) = torch.autograd.grad(loss, model.shared_weight, retain_graph=True)
        assert gradient.abs().max() > 0
