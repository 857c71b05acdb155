"""One user and many candidate items: the user's fields come once, and are encoded and looked up once."""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from hetegen_rec.config.export import Backend
from hetegen_rec.data.encoding import FieldEncoder
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.raw import column_keys
from hetegen_rec.scoring.backends import Graph, load_part
from hetegen_rec.scoring.layout import Layout
from hetegen_rec.scoring.manifest import Artifact
from hetegen_rec.scoring.rows import Row, Rows, as_table


class Side:
    """Some fields of an artifact's rows."""

    def __init__(self, artifact: Artifact, encoder: FieldEncoder, names: list[str]) -> None:
        """Args: names: of its fields."""
        self._schema, self._encoder = artifact.manifest.features, encoder
        self._layout = Layout(self._schema, names)
        self._fields = [one.field for one in self._layout.fields]
        self.columns = list(column_keys(self._schema, labelled=False, fields=self._fields))
        """Columns of the raw data that are read."""

    def ids(self, rows: Rows, where: str) -> NDArray[np.int64]:
        """[N, S_side] of raw rows.

        Raises:
            DataError: a table lacks a column, or values are not of the type of the training rows.
        """
        table = as_table(rows, self._schema, self.columns)
        return self._layout.ids(self._encoder.columns(table, 0, where, self._fields))


class Candidates:
    """The graph of `export.shared_fields`, and the encoding of its two sides."""

    def __init__(self, artifact: Artifact, backend: Backend, encoder: FieldEncoder) -> None:
        """Loads the graph.

        Raises:
            ArtifactError: the artifact does not have it.
        """
        self._graph = load_part(artifact, backend, "candidates")
        names, shared = artifact.manifest.features.field_names, artifact.manifest.shared_fields
        self._shared = Side(artifact, encoder, [name for name in names if name in shared])
        self.others = Side(artifact, encoder, [name for name in names if name not in shared])
        """The fields of the candidates."""

    def graph_for(self, shared: Row) -> Graph:
        """The graph of the ids of candidates, for what they share.

        Raises:
            DataError: it holds a column of the candidates, or a value that no training row could.
        """
        wrong = sorted(set(shared) & set(self.others.columns))
        if wrong:
            raise DataError(
                f"the shared columns hold {', '.join(wrong)}, which every candidate has for itself; they "
                f"may be {', '.join(self._shared.columns)}"
            )
        return partial(self._graph, torch.from_numpy(self._shared.ids([shared], "the shared columns")))
