"""Self-attention over the tokens of a row, guided by the difficulty of their fields."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from hetegen_rec.config.run import AttentionConfig

_is_for_cpu = ContextVar("_is_for_cpu", default=True)

_ROWS_AT_ONCE = 65_535  # on CUDA, whose kernels number rows in a dimension of the grid that ends there
_LOGITS_AT_ONCE = 1 << 20  # on the CPU: 4 MiB, which stay in its caches
_LONGEST_BY_PRODUCTS = 128  # tokens, on the CPU


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
    """As `scaled_dot_product_attention` of [B, H, S, D / H], for any B, in fp32 on the CPU.

    The CPU's fused kernel works row by row, and takes several times as long in bf16. On rows of few tokens
    products are faster (docs/benchmarks.md), as long as the caches hold their logits. A mask is [B, 1, S, S].
    """
    fused = functional.scaled_dot_product_attention
    if value.device.type != "cpu" or not _is_for_cpu.get():
        rows = _ROWS_AT_ONCE if value.device.type == "cuda" else len(value)
        return _attend_in_pieces(fused, rows, query, key, value, attn_mask, dropout_p, scale)
    query, key, value, kind = query.float(), key.float(), value.float(), value.dtype
    mask = None if attn_mask is None else attn_mask.float()
    with torch.autocast("cpu", enabled=False):
        _, heads, length, _ = query.shape
        if length > _LONGEST_BY_PRODUCTS or torch.compiler.is_compiling():
            mixed = fused(query, key, value, mask, dropout_p, scale=scale)
        else:
            rows = max(1, _LOGITS_AT_ONCE // (heads * length**2))
            mixed = _attend_in_pieces(product_attention, rows, query, key, value, mask, dropout_p, scale)
    return mixed.to(kind)


def product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """As `scaled_dot_product_attention` of [B, H, S, D / H]: batched matrix products around a softmax.

    Autograd keeps B H S^2 weights for them, which fused kernels compute anew.
    """
    batch, heads, length, dim = query.shape
    rows = (batch * heads, length, dim)
    query = query * (dim**-0.5 if scale is None else scale)
    logits = (query.reshape(rows) @ key.reshape(rows).mT).view(batch, heads, length, length)
    if attn_mask is not None:
        logits = logits + attn_mask
    weights = functional.dropout(logits.softmax(-1), dropout_p)
    mixed = weights.view(batch * heads, length, length) @ value.reshape(rows)
    return mixed.view(batch, heads, length, dim)


def _attend_in_pieces(
    attend_by: Callable[..., Tensor],
    rows: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    """Attention of at most so many rows at once."""
    if len(value) <= rows:
        return attend_by(query, key, value, attn_mask, dropout_p, scale=scale)
    queries, keys, values = (torch.split(whole, rows) for whole in (query, key, value))
    masks = [None] * len(values) if attn_mask is None else torch.split(attn_mask, rows)
    pieces = zip(queries, keys, values, masks, strict=True)
    return torch.cat([attend_by(*piece, dropout_p, scale=scale) for piece in pieces])


@contextmanager
def attention_as_on(device: str) -> Iterator[None]:
    """Context in which `attend` takes the way on the CPU that it takes on a device.

    It is slow, but what autograd keeps is what it would keep there.
    """
    token = _is_for_cpu.set(device == "cpu")
    try:
        yield
    finally:
        _is_for_cpu.reset(token)


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
