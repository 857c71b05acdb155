"""From a checkpoint to an artifact: tables, vocabularies and compiled networks in one directory."""

import logging
import shutil
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from hetegen_rec.config.data import Split
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.export import Backend
from hetegen_rec.config.run import CLICK_STAGES, RunConfig, Stage
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.encoding import vocabulary_path
from hetegen_rec.data.raw import iter_tables, list_row_groups
from hetegen_rec.data.reader import Reader
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.data.vocabulary import ExactVocabulary
from hetegen_rec.distributed.sharding import initial_rows
from hetegen_rec.evaluation.results import read_evaluation
from hetegen_rec.export.compile import compile_graph, require_compilers, row_encoder
from hetegen_rec.export.graph import ScoringGraph
from hetegen_rec.export.parity import compare, require_parity
from hetegen_rec.export.reference import Reference
from hetegen_rec.files import replace_directory
from hetegen_rec.models.embedding import table_shapes
from hetegen_rec.models.hetegen import build_model
from hetegen_rec.models.network import ClickNetwork
from hetegen_rec.scoring.layout import Layout
from hetegen_rec.scoring.manifest import (
    FORMAT_VERSION,
    Artifact,
    Manifest,
    describe_files,
    write_manifest,
)
from hetegen_rec.scoring.scorer import Scorer
from hetegen_rec.scoring.tables import make_groups, map_tables, writing
from hetegen_rec.scoring.vocabularies import write_vocabularies
from hetegen_rec.training.checkpoint import CheckpointInfo
from hetegen_rec.training.stored_tables import StoredWeights

logger = logging.getLogger(__name__)

_ROWS_AT_ONCE = 1 << 16  # of a table that has grown, while its new rows are made


class Exporter:
    """Makes the artifact of one checkpoint, by one process, in memory that does not grow with the tables."""

    def __init__(
        self, config: RunConfig, stage: Stage, info: CheckpointInfo, statistics: Statistics, sample: Reader
    ) -> None:
        """Opens a checkpoint.

        Args:
            config: of the run.
            stage: that wrote the checkpoint; one that scores clicks.
            info: the checkpoint, checked to be whole and of these data.
            statistics: of the training rows.
            sample: of the split `parity_split`, every row once, in order.

        Raises:
            ConfigError: the stage scores no clicks, or a back end cannot be compiled on this machine.
        """
        self._config, self._stage, self._info, self._statistics = config, stage, info, statistics
        if stage not in CLICK_STAGES:
            raise ConfigError(
                f"a model of `{stage}` scores no clicks; export one of {', '.join(CLICK_STAGES)}"
            )
        require_compilers(config.export.backends)
        self._weights = StoredWeights(info)
        self._layout = Layout(config.features)
        shapes = table_shapes(config.features, statistics, config.model.dim)
        self._dims = {shape.name: shape.dim for shape in shapes}
        self._rows = {shape.name: shape.num_rows for shape in shapes}
        self._batches = list(_first_rows(sample, config.export.parity_rows))

    def write(self, target: Path) -> Manifest:
        """Writes the artifact; it appears whole or not at all, in place of an earlier one.

        Raises:
            CheckpointError: the checkpoint does not fit the configuration.
            ParityError: a back end does not score as the training model does.
        """
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            manifest = self._write(partial)
            replace_directory(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return manifest

    def _write(self, root: Path) -> Manifest:
        config = self._config.export
        network = self._network()
        reference = Reference(self._config.features, self._dims, self._batches)
        groups = make_groups(self._dims, self._rows, config.tables, config.backends)
        encode = row_encoder(config.tables, config.backends, self._dims)
        with writing(root, groups, self._rows, encode) as writers:
            for table in self._dims:
                for first_row, rows in self._table(table):
                    writers[table].write(table, first_row, rows)
                    reference.take(table, first_row, rows)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            name=self._config.name,
            stage=self._stage,
            step=self._info.step,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions=_versions(),
            features=self._config.features,
            vocabularies=write_vocabularies(root, self._config.features, self._statistics, self._values()),
            precision=config.tables,
            dense=config.dense,
            tables=groups,
            backends={},
            strategies=["plain"],
            metrics=self._metrics(),
            parity={},
            files={},
        )
        for backend in config.backends:
            logger.info("compiling the network for %s", backend)
            graph = ScoringGraph(network, self._layout, self._dims, config.tables, config.dense, backend)
            tables = map_tables(Artifact(root, manifest), self._layout, backend)
            manifest.backends[backend] = compile_graph(graph, tables, backend, root)
        manifest = manifest.model_copy(update={"files": describe_files(root)})
        write_manifest(root, manifest)
        parity = self._compare(root, reference.score(network))
        manifest = manifest.model_copy(update={"parity": parity})
        write_manifest(root, manifest)
        return manifest

    def _network(self) -> ClickNetwork:
        """The trained network, of which only what scores is loaded."""
        config = self._config
        model = build_model(
            config.features,
            self._statistics,
            config.model,
            config.train,
            self._stage,
            config.stage(self._stage),
            config.seed,
        )
        network = model.network.eval()
        state = network.state_dict()
        stored = self._weights.dense({f"network.{name}": value for name, value in state.items()})
        network.load_state_dict({name: stored[f"network.{name}"] for name in state})
        return network

    def _table(self, table: str) -> Iterator[tuple[int, Tensor]]:
        """The rows of a table in blocks; those of ids that came after the checkpoint as training begins."""
        stored = self._info.tables[table][0]
        new = (
            (start, self._initial(table, start, min(start + _ROWS_AT_ONCE, self._rows[table])))
            for start in range(stored, self._rows[table], _ROWS_AT_ONCE)
        )
        return chain(self._weights.table_blocks(table), new)

    def _initial(self, table: str, start: int, stop: int) -> Tensor:
        return initial_rows(
            table, start, stop, self._dims[table], self._config.seed, self._config.model.init_std
        )

    def _values(self) -> dict[str, pa.Array]:
        """The values of every exact vocabulary, in order of id."""
        prepared = self._config.data.prepared_dir
        return {
            field.name: ExactVocabulary.read_values(vocabulary_path(prepared, field.name))
            for field in self._config.features.table_owners
            if field.vocabulary == "vocab"
        }

    def _metrics(self) -> dict[str, Any]:
        """What evaluation said of this checkpoint; empty if it was another, or none."""
        evaluation = read_evaluation(self._config.stage_dir(self._stage))
        if evaluation is None or evaluation["step"] != self._info.step:
            return {}
        return {
            split: {key: value for key, value in found.items() if isinstance(value, float | int)}
            for split, found in evaluation["splits"].items()
        }

    def _compare(self, root: Path, reference: NDArray[np.float32]) -> dict[str, Any]:
        """Scores the raw sample by every back end and refuses the artifact if one is beyond tolerance."""
        labels = np.concatenate([batch.labels[batch.row_ids >= 0].numpy() for batch in self._batches])
        split = parity_split(self._config)
        parity: dict[str, Any] = {}
        for backend in self._config.export.backends:
            scores = self._scores(root, backend, split, len(labels))
            found = compare(scores, reference, labels)
            require_parity(found, self._config.export, backend)
            parity[backend] = {"split": split, **found}
        return parity

    def _scores(self, root: Path, backend: Backend, split: Split, num_rows: int) -> NDArray[np.float32]:
        """[num_rows] by a back end, of raw rows as a caller would give them."""
        scorer = Scorer.load(root, backend=backend)
        features = self._config.features
        parts: list[NDArray[np.float32]] = []
        left = num_rows
        for group in list_row_groups(self._config.data.raw_paths(split)):
            for table in iter_tables(group, features, labelled=False):
                parts.append(scorer.score(table.slice(0, left)))
                left -= len(parts[-1])
                if not left:
                    return np.concatenate(parts)
        return np.concatenate(parts)


def parity_split(config: RunConfig) -> Split:
    """The split that an artifact is held against the training model on: valid, if there is one."""
    splits = list(config.splits())
    for split in ("valid", "test", "train"):
        if split in splits:
            return split
    raise ConfigError("data.train names no files")


def _first_rows(reader: Reader, num_rows: int) -> Iterator[Batch]:
    """Batches with the first rows of a reader, in order."""
    for batch in reader.epoch(Cursor()):
        yield batch
        num_rows -= int((batch.row_ids >= 0).sum())
        if num_rows <= 0:
            return


def _versions() -> dict[str, str]:
    return {"hetegen_rec": metadata.version("hetegen-rec")}
