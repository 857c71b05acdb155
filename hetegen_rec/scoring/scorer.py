"""Scores raw rows by an artifact. Needs torch, pyarrow and pydantic; neither TorchRec nor FBGEMM.

scorer = Scorer.load("artifacts/movielens")
probabilities = scorer.score([{"user_id": 7, "item_id": 42, "history": [3, 5]}])
"""

from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetegen_rec.config.export import Backend, ScoringStrategy
from hetegen_rec.data.encoding import FieldEncoder
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.raw import column_keys
from hetegen_rec.scoring.backends import Graph, choose_backend, load_graph, load_part
from hetegen_rec.scoring.candidates import Candidates
from hetegen_rec.scoring.layout import Layout
from hetegen_rec.scoring.manifest import Artifact, open_artifact
from hetegen_rec.scoring.rows import Row, Rows, as_table
from hetegen_rec.scoring.strategies import load_strategy
from hetegen_rec.scoring.tables import map_tables
from hetegen_rec.scoring.vocabularies import read_encoder

Loaded = TypeVar("Loaded")

ROWS_AT_ONCE = 4096
"""Most rows of one call of the network; more are scored in pieces, in bounded memory."""


class Scorer:
    """An artifact, ready to score. Several threads may call it at a time."""

    def __init__(self, artifact: Artifact, backend: Backend, graph: Graph, encoder: FieldEncoder) -> None:
        """See `load`."""
        self.artifact, self.backend = artifact, backend
        self._graph, self._encoder = graph, encoder
        self._loaded: dict[str, Any] = {}
        self._loading = Lock()
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

    def score(self, rows: Rows, strategy: ScoringStrategy = "plain") -> NDArray[np.float32]:
        """[N] click probabilities of raw rows.

        A column that a dictionary lacks, a null and a NaN are missing values; values that training did not
        see are out of vocabulary: as in training.

        Args:
            rows: a list of dictionaries, an Arrow table, or a pandas or polars data frame.
            strategy: one of `artifact.manifest.strategies`.

        Raises:
            ArtifactError: the artifact does not have the strategy.
            DataError: a table lacks a column, or values are not of the type of the training rows.
        """
        return self.score_ids(self.ids(rows), strategy)

    def score_candidates(self, shared: Row, rows: Rows) -> NDArray[np.float32]:
        """[N] click probabilities of candidates for one user: those of `score` for whole rows.

        Args:
            shared: the columns of the artifact's `shared_fields`.
            rows: the other columns, as `score` takes them.

        Raises:
            ArtifactError: the artifact has no shared fields.
            DataError: as `score`, or a column of the candidates is among the shared ones.
        """
        candidates = self._load_once("candidates", lambda: Candidates(*self._source, self._encoder))
        ids = candidates.others.ids(rows, "rows to score")
        return self._in_pieces(candidates.graph_for(shared), ids)

    def score_integers(self, values: NDArray[np.int64], given: NDArray[np.bool_]) -> NDArray[np.float32]:
        """[N] click probabilities of rows of raw integers, which the graph encodes itself.

        Args:
            values: [N, S] in the slots of `scoring.layout`: a list's values from its first slot on, of a
                sequence the most recent first. Numeric fields take whole numbers.
            given: [N, S]; False where there is no value.

        Raises:
            ArtifactError: the artifact was exported without `raw_integers`.
            DataError: the arrays are of other shapes or types.
        """
        graph = self._load_once("integers", lambda: load_part(*self._source, "integers"))
        shape = (len(values), self._layout.num_slots)
        if not _is(values, np.int64, shape) or not _is(given, np.bool_, shape):
            raise DataError(
                f"values are {values.dtype} {values.shape}, given is {given.dtype} {given.shape}; give int64 "
                f"and bool, both of shape (rows, {shape[1]})"
            )
        return self._in_pieces(graph, values, given)

    def ids(self, rows: Rows) -> NDArray[np.int64]:
        """[N, S]: the ids of raw rows, in the slots that graphs take.

        Raises:
            DataError: as `score`.
        """
        table = as_table(rows, self.artifact.manifest.features, self.columns)
        return self._layout.ids(self._encoder.columns(table, 0, "rows to score"))

    def score_ids(self, ids: NDArray[np.int64], strategy: ScoringStrategy = "plain") -> NDArray[np.float32]:
        """[N] click probabilities of encoded rows [N, S].

        Raises:
            ArtifactError: the artifact does not have the strategy.
        """
        if strategy == "plain":
            return self._in_pieces(self._graph, ids)
        return self._in_pieces(self._load_once(strategy, lambda: load_strategy(*self._source, strategy)), ids)

    @property
    def _source(self) -> tuple[Artifact, Backend]:
        return self.artifact, self.backend

    def _load_once(self, name: str, load: Callable[[], Loaded]) -> Loaded:
        """What plain scoring does not need is loaded by the first call that does."""
        with self._loading:
            if name not in self._loaded:
                self._loaded[name] = load()
            found: Loaded = self._loaded[name]
            return found

    def _in_pieces(self, graph: Callable[..., Tensor], *rows: NDArray[Any]) -> NDArray[np.float32]:
        """[N] of a graph that takes arrays with N rows, and the tables."""
        starts = range(0, len(rows[0]), ROWS_AT_ONCE)
        parts = [self._run(graph, [part[start : start + ROWS_AT_ONCE] for part in rows]) for start in starts]
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def _run(self, graph: Callable[..., Tensor], rows: list[NDArray[Any]]) -> NDArray[np.float32]:
        with torch.inference_mode():
            probabilities: NDArray[np.float32] = graph(*map(torch.from_numpy, rows), self._tables).numpy()
        return probabilities


def _is(array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, int]) -> bool:
    return array.dtype == dtype and array.shape == shape
