"""Difficulty-guided attention against a slow reference."""

import math
from functools import partial
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch.nn import functional

from hetegen_rec.config.run import AttentionConfig, AttentionGuidance
from hetegen_rec.models import attention as attention_module
from hetegen_rec.models.attention import Guidance, GuidedAttention, attend, product_attention

DIM, HEADS, LENGTH, ROWS = 8, 2, 5, 3
VARIANTS = get_args(AttentionGuidance)
FUSED = functional.scaled_dot_product_attention
NEUTRAL = Guidance(torch.ones(LENGTH), torch.zeros(LENGTH))


def attention(guidance="none", dropout=0.0):
    torch.manual_seed(0)
    return GuidedAttention(DIM, AttentionConfig(num_heads=HEADS, guidance=guidance), dropout)


@pytest.fixture
def x():
    return torch.randn(ROWS, LENGTH, DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def guidance():
    gain = torch.tensor([0.3, 2.0, 1.0, 1.7, 0.6])
    return Guidance(gain, torch.tensor([0.5, -1.0, 0.0, 2.0, -0.3]))


@pytest.fixture
def padding():
    holes = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    holes[0, 1] = holes[2, 3] = holes[2, 0] = True
    return holes


def reference(module, x, guidance, padding):
    """Attention by loops over rows, heads and queries."""
    size = DIM // HEADS
    query, key, value = module.input(x).split(DIM, dim=-1)
    mixed = torch.zeros(x.shape)
    for row in range(len(x)):
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            for i in range(LENGTH):
                logits = torch.full((LENGTH,), -math.inf)
                for j in range(LENGTH):
                    if padding is not None and padding[row, j]:
                        continue
                    logit = query[row, i, part] @ key[row, j, part] / math.sqrt(size)
                    if module.guidance in ("query", "query_key"):
                        logit = logit * guidance.gain[i]
                    if module.guidance == "query_key":
                        logit = logit * guidance.gain[j]
                    if module.guidance == "key_bias":
                        logit = logit + guidance.key_bias[j]
                    logits[j] = logit
                mixed[row, i, part] = logits.softmax(0) @ value[row, :, part]
    branch = module.output(mixed)
    return branch * guidance.gain[:, None] if module.guidance == "residual" else branch


@torch.no_grad()
@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_equals_the_reference(variant, with_padding, x, guidance, padding):
    module = attention(variant)
    holes = padding if with_padding else None
    torch.testing.assert_close(module(x, guidance, holes), reference(module, x, guidance, holes))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_neutral_guidance_is_plain_attention(variant, x):
    assert torch.equal(attention(variant)(x, NEUTRAL, None), attention("none")(x, NEUTRAL, None))


@torch.no_grad()
@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"none"}))
def test_every_variant_makes_a_difference(variant, x, guidance):
    plain = attention("none")(x, guidance, None)
    assert (attention(variant)(x, guidance, None) - plain).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_stands_in_padding_does_not_matter(variant, x, guidance, padding):
    module = attention(variant)
    before = module(x, guidance, padding)
    after = module(torch.where(padding[..., None], 100.0, x), guidance, padding)
    torch.testing.assert_close(before[~padding], after[~padding])


@torch.no_grad()
def test_a_key_bias_multiplies_the_attention_that_a_key_gets(x):
    module = attention("key_bias")
    bias = torch.zeros(LENGTH)
    bias[2] = 50.0
    value = module.input(x)[:, 2, 2 * DIM :]
    expected = module.output(value)[:, None].expand(ROWS, LENGTH, DIM)
    torch.testing.assert_close(module(x, Guidance(torch.ones(LENGTH), bias), None), expected)


@torch.no_grad()
def test_attention_is_dropped_in_training_only(x):
    module = attention(dropout=0.5)
    assert not torch.equal(module(x, NEUTRAL, None), module(x, NEUTRAL, None))
    module.eval()
    assert torch.equal(module(x, NEUTRAL, None), attention()(x, NEUTRAL, None))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_attends_in_fp32_on_the_cpu(autocast):
    numbers = torch.Generator().manual_seed(2)
    shape = (ROWS, HEADS, LENGTH, DIM // HEADS)
    query, key, value = (torch.randn(shape, generator=numbers).bfloat16() for _ in range(3))
    holes = torch.zeros(ROWS, 1, LENGTH, LENGTH)
    holes[..., 1] = -math.inf
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mixed = attend(query, key, value, attn_mask=holes)
    exact = attend(query.float(), key.float(), value.float(), attn_mask=holes)
    assert torch.equal(mixed, exact.bfloat16())  # rounded once, at the end


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rows_at_once", [1, 2, ROWS])
@pytest.mark.parametrize("attend_by", [FUSED, product_attention])
def test_rows_in_pieces_attend_as_all_at_once(masked, rows_at_once, attend_by, padding):
    numbers = torch.Generator().manual_seed(3)
    shape = (ROWS, HEADS, LENGTH, DIM // HEADS)
    parts = [torch.randn(shape, generator=numbers, requires_grad=True) for _ in range(3)]
    holes = torch.zeros(ROWS, LENGTH).masked_fill(padding, -math.inf)[:, None, None, :]
    mask = holes.expand(ROWS, 1, LENGTH, LENGTH) if masked else None
    upstream = torch.randn(shape, generator=numbers)
    found = []
    for attend_all in (FUSED, partial(attention_module._attend_in_pieces, attend_by, rows_at_once)):
        mixed = attend_all(*parts, mask, 0.0, scale=0.7)
        found.append([mixed, *torch.autograd.grad(mixed, parts, upstream)])
    for whole, in_pieces in zip(*found, strict=True):
        torch.testing.assert_close(in_pieces, whole)


def test_weights_are_dropped_and_the_others_grow():
    same, value = torch.zeros(1, 1, 1000, 1), torch.ones(1, 1, 1000, 1)
    torch.manual_seed(0)
    mixed = product_attention(same, same, value, dropout_p=0.5)
    assert mixed.mean() == pytest.approx(1.0, abs=0.01)
    assert mixed.std() == pytest.approx(1000**-0.5, rel=0.2)  # of a mean of 1,000 values that are 0 or 2


@pytest.mark.parametrize(("length", "pieces"), [(128, [32, 1]), (129, [])])
def test_the_cpu_attends_by_products_to_rows_whose_logits_its_caches_hold(length, pieces, monkeypatch):
    seen = []

    def products(query, *others, **options):
        seen.append(len(query))
        return product_attention(query, *others, **options)

    monkeypatch.setattr(attention_module, "product_attention", products)
    parts = torch.randn(3, 33, 2, length, 4, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(attend(*parts), FUSED(*parts))
    assert seen == pieces


def test_rows_are_cut_on_cuda_where_a_kernel_could_not_number_them(monkeypatch):
    monkeypatch.setattr(attention_module, "_attend_in_pieces", lambda attend_by, rows, *_: (attend_by, rows))
    elsewhere = SimpleNamespace(device=torch.device("cuda"))
    assert attend(elsewhere, elsewhere, elsewhere) == (FUSED, 65_535)
