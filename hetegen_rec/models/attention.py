"""Self-attention over the tokens of a row, guided by the difficulty of their fields."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from hetegen_rec.config.run import AttentionConfig

_is_fp32_on_cpu = ContextVar("_is_fp32_on_cpu", default=True)

_ROWS_AT_ONCE = 65_535  # on CUDA, whose kernels number rows in a dimension of the grid that ends there


@dataclass
class Guidance:
    """What attention knows about difficulty; constants to the gradient."""

    gain: Tensor
    """[S]: g_f = sqrt(w_f) of each token's field, 1 for the label."""
    key_bias: Tensor
    """[S]: s_f - mean s of each token's field, 0 for the label."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """As `scaled_dot_product_attention` of [B, H, S, D / H], in fp32 on the CPU.

    The CPU's fused kernel takes several times as long in bf16 on heads of few numbers. On CUDA any B will do.
    A mask is [B, 1, S, S].
    """
    fused = functional.scaled_dot_product_attention
    if value.device.type == "cuda" and len(value) > _ROWS_AT_ONCE:
        return _attend_in_pieces(query, key, value, attn_mask, dropout_p, scale)
    if value.device.type != "cpu" or value.dtype == torch.float32 or not _is_fp32_on_cpu.get():
        return fused(query, key, value, attn_mask, dropout_p, scale=scale)
    bias = None if attn_mask is None else attn_mask.float()
    with torch.autocast("cpu", enabled=False):
        mixed = fused(query.float(), key.float(), value.float(), bias, dropout_p, scale=scale)
    return mixed.to(value.dtype)


def _attend_in_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    """Attention of so few rows at once that every kernel takes them."""
    queries, keys, values = (torch.split(whole, _ROWS_AT_ONCE) for whole in (query, key, value))
    masks = [None] * len(values) if attn_mask is None else torch.split(attn_mask, _ROWS_AT_ONCE)
    fused = functional.scaled_dot_product_attention
    pieces = zip(queries, keys, values, masks, strict=True)
    return torch.cat([fused(*piece, dropout_p, scale=scale) for piece in pieces])


@contextmanager
def attention_as_on(device: str) -> Iterator[None]:
    """Context in which `attend` takes the precision on the CPU that it takes on a device.

    It is slow, but what autograd keeps is what it would keep there.
    """
    token = _is_fp32_on_cpu.set(device == "cpu")
    try:
        yield
    finally:
        _is_fp32_on_cpu.reset(token)


class GuidedAttention(nn.Module):
    """Multi-head attention with the gain of HeteGenCTR (arXiv 2605.24986), in four places.

    `query` and `query_key` scale the logits; `key_bias` shifts the logits of a key for all queries
    (a bias per query is a no-op under softmax); `residual` scales the branch itself, which the next
    normalisation does not undo.
    """

    def __init__(self, dim: int, config: AttentionConfig, dropout: float) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.guidance = config.guidance
        self.dropout = dropout
        self.attend: Callable[..., Tensor] = attend
        self.input = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor, guidance: Guidance, padding: Tensor | None) -> Tensor:
        """Attends over x [B, S, D]; padding [B, S] bool marks keys that do not exist."""
        batch, length, dim = x.shape
        shape = (batch, length, self.num_heads, dim // self.num_heads)
        query, key, value = (
            part.view(shape).transpose(1, 2) for part in self.input(x).chunk(3, dim=-1)
        )  # each [B, H, S, D / H]
        gain = guidance.gain[:, None]
        if self.guidance in ("query", "query_key"):
            query = query * gain
        if self.guidance == "query_key":
            key = key * gain
        mixed = self.attend(
            query,
            key,
            value,
            attn_mask=self._logit_bias(query, guidance, padding),
            dropout_p=self.dropout if self.training else 0.0,
        )
        branch = self.output(mixed.transpose(1, 2).reshape(batch, length, dim))
        return branch * gain if self.guidance == "residual" else branch

    def _logit_bias(self, query: Tensor, guidance: Guidance, padding: Tensor | None) -> Tensor | None:
        bias = None
        if self.guidance == "key_bias":
            bias = guidance.key_bias.to(query.dtype)[None, None, None, :]
        if padding is not None:
            holes = torch.zeros_like(padding, dtype=query.dtype).masked_fill(padding, float("-inf"))
            bias = holes[:, None, None, :] if bias is None else bias + holes[:, None, None, :]
        if bias is None:
            return None
        return bias.expand(query.shape[0], 1, query.shape[2], query.shape[2])
