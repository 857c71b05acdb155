"""Scores raw rows by an artifact. Needs torch, pyarrow and pydantic; neither TorchRec nor FBGEMM.

scorer = Scorer.load("artifacts/movielens")
probabilities = scorer.score([{"user_id": 7, "item_id": 42, "history": [3, 5]}])
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hetegen_rec.config.export import Backend
from hetegen_rec.data.encoding import FieldEncoder
from hetegen_rec.data.raw import column_keys
from hetegen_rec.scoring.backends import Graph, choose_backend, load_graph
from hetegen_rec.scoring.layout import Layout
from hetegen_rec.scoring.manifest import Artifact, open_artifact
from hetegen_rec.scoring.rows import Rows, as_table
from hetegen_rec.scoring.tables import map_tables
from hetegen_rec.scoring.vocabularies import read_encoder

ROWS_AT_ONCE = 4096
"""Most rows of one call of the network; more are scored in pieces, in bounded memory."""


class Scorer:
    """An artifact, ready to score. Several threads may call it at a time."""

    def __init__(self, artifact: Artifact, backend: Backend, graph: Graph, encoder: FieldEncoder) -> None:
        """See `load`."""
        self.artifact, self.backend = artifact, backend
        self._graph, self._encoder = graph, encoder
        schema = artifact.manifest.features
        self._layout = Layout(schema)
        self._tables = map_tables(artifact, self._layout, backend)
        self.columns = list(column_keys(schema, labelled=False))
        """Columns of the raw data that are read."""

    @classmethod
    def load(cls, path: str | Path, *, backend: Backend | None = None, verify: bool = True) -> "Scorer":
        """Opens an artifact, checks it, and loads its network.

        Args:
            path: directory that `hetegen export` wrote.
            backend: which of its back ends to use; default: the fastest that can run here.
            verify: read every file once and compare checksums; without, only sizes are compared.

        Raises:
            ArtifactError: it is none, was changed, is of another format, or cannot run here.
        """
        artifact = open_artifact(path, verify=verify)
        chosen = choose_backend(artifact, backend)
        return cls(artifact, chosen, load_graph(artifact, chosen), read_encoder(artifact))

    def score(self, rows: Rows) -> NDArray[np.float32]:
        """[N] click probabilities of raw rows.

        A column that a dictionary lacks, a null and a NaN are missing values; values that training did not
        see are out of vocabulary: as in training.

        Args:
            rows: a list of dictionaries, an Arrow table, or a pandas or polars data frame.

        Raises:
            DataError: a table lacks a column, or values are not of the type of the training rows.
        """
        return self.score_ids(self.ids(rows))

    def ids(self, rows: Rows) -> NDArray[np.int64]:
        """[N, S]: the ids of raw rows, in the slots that graphs take.

        Raises:
            DataError: as `score`.
        """
        table = as_table(rows, self.artifact.manifest.features, self.columns)
        return self._layout.ids(self._encoder.columns(table, 0, "rows to score"))

    def score_ids(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[N] click probabilities of encoded rows [N, S]."""
        parts = [self._run(ids[start : start + ROWS_AT_ONCE]) for start in range(0, len(ids), ROWS_AT_ONCE)]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _run(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.inference_mode():
            probabilities: NDArray[np.float32] = self._graph(torch.from_numpy(ids), self._tables).numpy()
        return probabilities
