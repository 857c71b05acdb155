"""What an artifact is held against: the training model, on the table rows that a sample of rows looks up."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, KeyedTensor

from hetegen_rec.config.schema import ReservedId, Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.inference.lookup import BatchRows, Lookup
from hetegen_rec.inference.strategy import Strategy
from hetegen_rec.models.embedding import TableShape, build_tables
from hetegen_rec.models.hetegen import HeteGen
from hetegen_rec.models.network import ClickNetwork, Outputs


class Reference:
    """The training model on a sample, with no more rows in its tables than the sample needs.

    It runs TorchRec's lookup, the assembly of tokens and the network as training does. So it can be had of
    tables that are larger than memory.
    """

    def __init__(
        self, schema: Schema, dims: dict[str, int], batches: Sequence[Batch], others: Iterable[Batch] = ()
    ) -> None:
        """Notes which rows are needed.

        Args:
            schema: the fields.
            dims: width of each table.
            batches: the sample.
            others: batches that are looked up besides; they are not kept.
        """
        self._schema = schema
        self._batches = list(batches)
        self._dims = dims
        keys = {table: [token.key for token in schema.tokens_on(table)] for table in dims}
        # What stands for a dropped cell may be the row of unknown values.
        self._wanted = {table: torch.tensor([int(ReservedId.OUT_OF_VOCABULARY)]) for table in dims}
        for part in (self._batches, others):
            for batch in part:
                for table, known in self._wanted.items():
                    found = [batch.kjt[key].values() for key in keys[table]]
                    self._wanted[table] = torch.unique(torch.cat([known, *found]))
        self._rows = {table: torch.zeros(len(ids), dims[table]) for table, ids in self._wanted.items()}

    def take(self, table: str, first_row: int, rows: Tensor) -> None:
        """Is shown [N, dim] rows of a table, from one of its rows on, and keeps those that it needs."""
        wanted = self._wanted[table]
        start, stop = np.searchsorted(wanted.numpy(), [first_row, first_row + len(rows)])
        self._rows[table][start:stop] = rows[wanted[start:stop] - first_row]

    def score(self, network: ClickNetwork) -> NDArray[np.float32]:
        """[N] click probabilities of the sample's rows, by a trained network on the CPU."""
        model = HeteGen(self._tables, network).eval()

        def plain(batch: Batch) -> Tensor:
            outputs: Outputs = model(batch)[1]
            assert outputs.logits is not None  # a model in eval mode scores
            return outputs.logits.sigmoid()

        with torch.no_grad():
            return _of_real_rows([(batch, plain(batch)) for batch in self._batches])

    def lookup(self, network: ClickNetwork) -> Lookup:
        """The tables and a trained network, for test-time strategies."""
        return Lookup(self._tables, network, self._schema)

    def score_by(self, strategy: Strategy[BatchRows], lookup: Lookup) -> NDArray[np.float32]:
        """[N] click probabilities of the sample's rows by a test-time strategy."""
        with lookup.scoring("cpu"):
            return _of_real_rows(
                [
                    (batch, strategy.score(BatchRows.of(lookup.tokens(batch.kjt), batch)).probabilities)
                    for batch in self._batches
                ]
            )

    @cached_property
    def _tables(self) -> "_SampledTables":
        """With all rows that `take` was shown."""
        shapes = [TableShape(table, len(rows), self._dims[table]) for table, rows in self._rows.items()]
        tables = build_tables(self._schema, shapes).to_empty(device="cpu")
        with torch.no_grad():
            for table, rows in self._rows.items():
                tables.embedding_bags[table].weight.copy_(rows)
        table_of = {token.key: self._schema.field(token.field).table_name for token in self._schema.tokens}
        return _SampledTables(tables, {key: self._wanted[table] for key, table in table_of.items()})


class _SampledTables(nn.Module):
    """Tables of which only some rows are there, by the ids that they have in the whole tables."""

    def __init__(self, tables: EmbeddingBagCollection, ids: Mapping[str, Tensor]) -> None:
        """Args: ids: by key of the lookup, sorted, those that are there."""
        super().__init__()
        self._tables, self._ids = tables, ids

    def forward(self, kjt: KeyedJaggedTensor) -> KeyedTensor:
        keys = kjt.keys()
        places = [torch.searchsorted(self._ids[key], kjt[key].values()) for key in keys]
        return self._tables(
            KeyedJaggedTensor(keys=keys, values=torch.cat(places), lengths=kjt.lengths(), stride=kjt.stride())
        )


def _of_real_rows(scored: list[tuple[Batch, Tensor]]) -> NDArray[np.float32]:
    scores: NDArray[np.float32] = torch.cat([part[batch.row_ids >= 0] for batch, part in scored]).numpy()
    return scores
