"""What the denoiser thinks of a cell that it does not see: how likely its value is, and what it should be.

All of it is derived (docs/method.md section 11).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hetegen_rec.config.schema import NUM_RESERVED_IDS, Schema
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.inference.lookup import BatchRows, Lookup
from hetegen_rec.models.reconstruction import Reconstruction


@dataclass(frozen=True)
class Candidates:
    """The K values of a field among which a masked cell is regenerated."""

    tokens: Tensor
    """[K, D]: their table rows."""
    log_prior: Tensor
    """[K]: log share of each among the field's training values."""


@dataclass(frozen=True)
class Judgement:
    """Of one token in B rows."""

    lift: Tensor
    """[B]: log p(value | rest of the row) - log p(value)."""
    expected: Tensor
    """[B, D]: mean table row under p(. | rest of the row)."""


class Regenerator:
    """Reads the reconstruction heads at test time.

    The candidates of a sampled softmax are those of the batch in training. Here they are drawn from the
    field's training frequencies once, the same on every rank, so that scores do not depend on who shares
    a batch. Under either proposal the partition function is estimated by the mean of
    exp(logit) / frequency.
    """

    def __init__(self, reconstruction: Reconstruction, candidates: Mapping[str, Candidates]) -> None:
        """Args: candidates: by field; fields without any are not judged."""
        self._full, self._sampled = reconstruction.full, reconstruction.sampled
        self._candidates = candidates

    @property
    def fields(self) -> frozenset[str]:
        """The fields whose cells can be judged."""
        return frozenset(self._candidates)

    def judge(self, field: str, token: int, hidden: Tensor, rows: BatchRows) -> Judgement:
        """Judges a token that was masked when the denoiser saw the rows.

        Args:
            field: of the token.
            token: its place in the row.
            hidden: [B, T + 1, D] of the denoiser.
            rows: as they were looked up.
        """
        candidates = self._candidates[field]
        prior = rows.batch.log_prior[:, token]
        if self._full is not None and field in self._full.positions:
            logits = self._full.logits(field, hidden[:, token])  # [B, V]
            lift = -self._full.cross_entropy(field, logits, rows.batch) - prior
            return Judgement(lift, _mean(logits, candidates.tokens))
        assert self._sampled is not None, field
        query = self._sampled.queries(field, hidden[:, token])  # [B, D]
        own = (query * _unit(rows.tokens[:, token])).sum(-1) - prior
        logits = query @ _unit(candidates.tokens).T - candidates.log_prior  # [B, K]
        chance = logits.logsumexp(-1) - math.log(logits.shape[1])
        return Judgement(own - chance, _mean(logits, candidates.tokens))


def look_up_candidates(
    lookup: Lookup,
    schema: Schema,
    statistics: Statistics,
    reconstruction: Reconstruction,
    most: int,
    device: torch.device,
) -> dict[str, Candidates]:
    """Looks up all values of each field with a full softmax, and `most` drawn ones of the others.

    Fields without a value in training have none. A collective.
    """
    chosen = dict(_choose(schema, statistics, reconstruction, most))
    longest = max((len(ids) for ids in chosen.values()), default=0)
    ids = torch.full((longest, len(schema.tokens)), -1)
    for field, values in chosen.items():
        ids[: len(values), schema.span(field)[0]] = torch.from_numpy(values)
    if not longest:
        return {}
    tokens = lookup.tokens_of_ids(ids.to(device))
    return {
        field: Candidates(
            tokens[: len(values), schema.span(field)[0]],
            torch.from_numpy(statistics.log_prior(field)[values]).to(device),
        )
        for field, values in chosen.items()
    }


def _choose(
    schema: Schema, statistics: Statistics, reconstruction: Reconstruction, most: int
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Ids of the candidates of each field."""
    for field in reconstruction.full_fields:
        yield field, np.arange(NUM_RESERVED_IDS, statistics.table_rows(schema.field(field).table_name))
    for field in reconstruction.sampled_fields:
        counts = np.array(statistics.fields[field].counts)
        counts[:NUM_RESERVED_IDS] = 0
        if counts.any():
            yield field, draw_by_count(counts, most)


def draw_by_count(counts: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Indices in proportion to their counts, drawn systematically: at even distances along the sum.

    Args:
        counts: [N], not all zero.
        number: how many; an index comes several times where its share asks for it.
    """
    ends = np.cumsum(counts, dtype=np.float64)
    places = (np.arange(number) + 0.5) / number * ends[-1]
    return np.searchsorted(ends, places, side="right")


def _unit(tokens: Tensor) -> Tensor:
    return functional.normalize(tokens.float(), dim=-1)


def _mean(logits: Tensor, tokens: Tensor) -> Tensor:
    """[B, K] logits over tokens [K, D] -> their mean [B, D]."""
    return logits.softmax(-1) @ tokens.float()
