"""The attention of a graph that scores gives what the fused kernel gives, where it takes its place."""

import pytest
import torch
from torch import nn

from hetegen_rec.config.run import AttentionConfig
from hetegen_rec.export.attention import attend_by_products
from hetegen_rec.models.attention import Guidance, GuidedAttention, attend


@pytest.mark.parametrize("guidance", ["none", "residual", "query_key", "key_bias"])
@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("padded", [False, True])
def test_products_equal_the_fused_kernel(guidance, length, padded):
    attention = GuidedAttention(16, AttentionConfig(num_heads=2, guidance=guidance), dropout=0.0).eval()
    x = torch.randn(7, length, 16)
    given = Guidance(1.0 + torch.rand(length), torch.randn(length))
    padding = torch.zeros(7, length, dtype=torch.bool)
    padding[::2, 1:] = padded
    with torch.no_grad():
        expected = attention(x, given, padding)
        attend_by_products(nn.ModuleList([attention]), length)
        assert attention.attend is not attend
        torch.testing.assert_close(attention(x, given, padding), expected, atol=1e-5, rtol=0)


def test_long_sequences_keep_the_fused_kernel():
    attention = GuidedAttention(16, AttentionConfig(num_heads=2), dropout=0.0)
    attend_by_products(nn.ModuleList([attention]), 300)
    assert attention.attend is attend
