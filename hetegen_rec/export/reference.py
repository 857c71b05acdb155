"""What an artifact is held against: the training model, on the table rows that a sample of rows looks up."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec import KeyedJaggedTensor

from hetegen_rec.config.schema import Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.models.embedding import TableShape, build_tables
from hetegen_rec.models.hetegen import HeteGen
from hetegen_rec.models.network import ClickNetwork, Outputs


class Reference:
    """The training model on a sample, with no more rows in its tables than the sample needs.

    It runs TorchRec's lookup, the assembly of tokens and the network as training does. So it can be had of
    tables that are larger than memory.
    """

    def __init__(self, schema: Schema, dims: dict[str, int], batches: Sequence[Batch]) -> None:
        """Notes which rows are needed.

        Args:
            schema: the fields.
            dims: width of each table.
            batches: the sample.
        """
        self._schema = schema
        self._batches = list(batches)
        self._dims = dims
        self._table_of = {token.key: schema.field(token.field).table_name for token in schema.tokens}
        self._wanted = {table: self._ids_on(table) for table in dims}
        self._rows = {
            table: torch.zeros(max(len(ids), 1), dims[table]) for table, ids in self._wanted.items()
        }

    def take(self, table: str, first_row: int, rows: Tensor) -> None:
        """Is shown [N, dim] rows of a table, from one of its rows on, and keeps those that it needs."""
        wanted = self._wanted[table]
        start, stop = np.searchsorted(wanted.numpy(), [first_row, first_row + len(rows)])
        self._rows[table][start:stop] = rows[wanted[start:stop] - first_row]

    def score(self, network: ClickNetwork) -> NDArray[np.float32]:
        """[N] click probabilities of the sample's rows, by a trained network on the CPU."""
        shapes = [TableShape(table, len(rows), self._dims[table]) for table, rows in self._rows.items()]
        model = HeteGen(build_tables(self._schema, shapes).to_empty(device="cpu"), network).eval()
        with torch.no_grad():
            for table, rows in self._rows.items():
                model.ebc.embedding_bags[table].weight.copy_(rows)  # type: ignore[index, union-attr]
            parts = [self._score(model, batch) for batch in self._batches]
        scores: NDArray[np.float32] = torch.cat(parts).numpy()
        return scores

    def _score(self, model: HeteGen, batch: Batch) -> Tensor:
        outputs: Outputs = model(replace(batch, kjt=self._renumbered(batch.kjt)))[1]
        assert outputs.logits is not None  # a model in eval mode scores
        return outputs.logits.sigmoid()[batch.row_ids >= 0]

    def _renumbered(self, kjt: KeyedJaggedTensor) -> KeyedJaggedTensor:
        keys = kjt.keys()
        parts = [torch.searchsorted(self._wanted[self._table_of[key]], kjt[key].values()) for key in keys]
        return KeyedJaggedTensor(
            keys=keys, values=torch.cat(parts), lengths=kjt.lengths(), stride=kjt.stride()
        )

    def _ids_on(self, table: str) -> Tensor:
        """Sorted distinct ids that the sample looks up in a table."""
        keys = [key for key, owner in self._table_of.items() if owner == table]
        ids = torch.cat([batch.kjt[key].values() for batch in self._batches for key in keys])
        return torch.unique(ids)
