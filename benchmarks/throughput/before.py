"""How hot parts of a step were written before they were made fast, so that each gain can be measured again.

Every entry of `EARLIER` is a context in which one part is as it was. What it computes is the same.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias
from unittest import mock

import torch
from torch import Tensor
from torchrec import KeyedTensor

from benchmarks.throughput.stopwatch import Turn, Workload
from hetegen_rec.distributed import heaps
from hetegen_rec.models import attention, reconstruction
from hetegen_rec.models.ctr import FieldPooling, mean_of_present
from hetegen_rec.models.embedding import TokenAssembly
from hetegen_rec.models.sampled_loss import Candidates
from hetegen_rec.training import setup

Part: TypeAlias = Literal[
    "field_slices",
    "foreach_adamw",
    "looked_up_by_key",
    "all_candidates",
    "fused_attention",
    "freed_blocks",
    "ordinary_pages",
]


class AsBefore:
    """A workload that is made, and has its turns, with some parts as they were."""

    def __init__(self, parts: Iterable[Part], make: Callable[[], Workload]) -> None:
        self._parts = list(parts)
        with self._as_they_were():
            self._workload = make()

    def turn(self) -> Turn:
        """The workload's."""
        with self._as_they_were():
            return self._workload.turn()

    @contextmanager
    def _as_they_were(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(EARLIER[part]())
            yield


def _field_slices(self: FieldPooling, tokens: Tensor, present: Tensor) -> Tensor:
    """A slice a field, each of which fills a gradient of all tokens in the backward pass."""
    pooled, start = [], 0
    for size, is_sequence in zip(self.sizes, self.is_sequence, strict=True):
        if is_sequence:
            end = start + size
            pooled.append(mean_of_present(tokens[:, start:end], present[:, start:end]))
        else:
            pooled += [tokens[:, place] for place in range(start, start + size)]
        start += size
    return torch.stack(pooled, dim=1)


def _looked_up_by_key(
    self: TokenAssembly, looked_up: KeyedTensor, _movement: Tensor | None = None, *, with_norms: bool = True
) -> tuple[Tensor, Tensor | None]:
    """A tensor a key, stacked again by group; norms are computed whether or not they are read."""
    rows = looked_up.to_dict()
    tokens, norms = [], []
    for group, keys in self.groups.items():
        block = torch.stack([rows[key] for key in keys], dim=1)
        norms.append(block.square().sum(-1))
        tokens.append(self.projections[group](block) if group else block)
    all_norms = torch.cat(norms, 1)[:, self.order]
    return torch.cat(tokens, 1)[:, self.order], all_norms if with_norms else None


@dataclass(frozen=True)
class _AllCandidates(Candidates):
    """The first K rows of a batch, however often a value comes."""

    ids: Tensor
    is_candidate: Tensor
    log_q: Tensor

    @classmethod
    def among(cls, ids: Tensor, is_candidate: Tensor, log_q: Tensor) -> "_AllCandidates":
        """Takes note of them."""
        distinct = Candidates.among(ids, is_candidate, log_q)
        return cls(**vars(distinct), ids=ids, is_candidate=is_candidate, log_q=log_q)

    def cross_entropy(self, positive: Tensor, query: Tensor, keys: Tensor, is_target: Tensor) -> Tensor:
        """From the logits of every cell with every candidate, by torch's own functions."""
        limit = self.is_candidate.shape[1]
        positive = positive + self.log_own()
        negative = (query @ keys[:, :limit].mT).float() - self.log_q[:, None, :limit]
        is_none = self._has_own() | ~self.is_candidate[:, None]
        logits = torch.cat([positive[..., None], negative.masked_fill(is_none, float("-inf"))], -1)
        return torch.where(is_target, torch.logsumexp(logits, -1) - positive, 0.0)

    def _has_own(self) -> Tensor:
        """[F, B, K] bool: whether one of them has a row's own value."""
        return self.ids[:, :, None] == self.ids[:, None, : self.is_candidate.shape[1]]


@contextmanager
def _all_candidates() -> Iterator[None]:
    def cross_entropy(
        positive: Tensor, query: Tensor, keys: Tensor, candidates: _AllCandidates, is_target: Tensor
    ) -> Tensor:
        return candidates.cross_entropy(positive, query, keys, is_target)

    with (
        mock.patch.object(reconstruction, "Candidates", _AllCandidates),
        mock.patch.object(reconstruction, "sampled_cross_entropy", cross_entropy),
    ):
        yield


def _foreach_adamw() -> AbstractContextManager[Any]:
    fused = torch.optim.AdamW

    def foreach(parameters: Any, lr: float, **_options: Any) -> torch.optim.AdamW:
        return fused(parameters, lr=lr)

    return mock.patch.object(torch.optim, "AdamW", foreach)


@contextmanager
def _freed_blocks() -> Iterator[None]:
    """Given back to the system, as malloc sets itself up where a step's blocks have up to 7 MB."""
    heaps.set_malloc(heaps.MMAP_THRESHOLD, 8 << 20)
    heaps.set_malloc(heaps.TRIM_THRESHOLD, 16 << 20)
    try:
        yield
    finally:
        heaps.keep_freed_blocks()


EARLIER: dict[Part, Callable[[], AbstractContextManager[Any]]] = {
    "field_slices": lambda: mock.patch.object(FieldPooling, "forward", _field_slices),
    "foreach_adamw": _foreach_adamw,
    "looked_up_by_key": lambda: mock.patch.object(TokenAssembly, "forward", _looked_up_by_key),
    "all_candidates": _all_candidates,
    "fused_attention": lambda: mock.patch.object(attention, "_LONGEST_BY_PRODUCTS", 0),
    "freed_blocks": _freed_blocks,
    "ordinary_pages": lambda: mock.patch.object(setup, "move_tables_to_huge_pages", return_value=None),
}
"""By part, what makes it as it was."""
