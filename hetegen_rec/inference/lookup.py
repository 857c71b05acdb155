"""A sharded model cut behind its tables: one lookup, then any number of passes of the network."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor

from hetegen_rec.config.schema import ReservedId, Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.inference.strategy import Rows
from hetegen_rec.models.network import ClickNetwork

_ROWS_AT_ONCE = 1024  # of a lookup of given ids


@dataclass(frozen=True)
class BatchRows(Rows):
    """The looked-up rows of a batch."""

    batch: Batch

    @classmethod
    def of(cls, tokens: Tensor, batch: Batch) -> "BatchRows":
        """The rows of a batch, by their tokens [B, T, D]."""
        return cls(tokens, batch.ids, batch.log_rate, batch)


class Lookup:
    """The part of a model that needs all ranks."""

    def __init__(self, tables: nn.Module, network: ClickNetwork, schema: Schema) -> None:
        """Puts both in eval mode.

        Args:
            tables: the sharded part of a model.
            network: the replicated part.
            schema: the fields of a row.
        """
        self._tables = tables.eval()
        network.eval()
        self._keys = [token.key for token in schema.tokens]
        self.network = network

    @contextmanager
    def scoring(self, device_type: str) -> Iterator[None]:
        """Context in which the network computes as it does when it scores by itself."""
        with torch.no_grad(), torch.autocast(device_type, torch.bfloat16, enabled=self.network.autocast):
            yield

    def tokens(self, kjt: KeyedJaggedTensor) -> Tensor:
        """[B, T, D]: what the network scores. A collective; every rank has rows of its own."""
        tokens: Tensor = self.network.assembly(self._tables(kjt), with_norms=False)[0]
        return tokens

    def tokens_of_ids(self, ids: Tensor) -> Tensor:
        """[K, T, D] of ids [K, T], zero where an id is -1. A collective: the same K on all ranks."""
        with self.scoring(ids.device.type):
            starts = range(0, len(ids), _ROWS_AT_ONCE)
            parts = [self.tokens(self._kjt(ids[start : start + _ROWS_AT_ONCE])) for start in starts]
        return torch.cat(parts)

    def unknown_tokens(self, device: torch.device) -> Tensor:
        """[T, D]: the out-of-vocabulary row of every token's table. A collective."""
        unknown = int(ReservedId.OUT_OF_VOCABULARY)
        return self.tokens_of_ids(torch.full((1, len(self._keys)), unknown, device=device))[0]

    def _kjt(self, ids: Tensor) -> KeyedJaggedTensor:
        by_token = ids.T.contiguous()
        filled = by_token >= 0
        return KeyedJaggedTensor(
            keys=self._keys,
            values=by_token[filled],
            lengths=filled.reshape(-1).to(torch.int32),
            stride=ids.shape[0],
        )
