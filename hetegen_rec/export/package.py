"""From a checkpoint to an artifact: tables, vocabularies and compiled networks in one directory."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from hetegen_rec.checkout import describe_checkout
from hetegen_rec.config.data import Split
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.export import ScoringStrategy
from hetegen_rec.config.run import CLICK_STAGES, RunConfig, Stage
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.encoding import vocabulary_path
from hetegen_rec.data.manifest import read_manifest
from hetegen_rec.data.raw import expand_paths, iter_tables, read_shape, row_groups
from hetegen_rec.data.reader import Reader
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.data.vocabulary import ExactVocabulary
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.distributed.sharding import initial_rows
from hetegen_rec.evaluation.results import read_evaluation, strategy_note
from hetegen_rec.export.compile import compile_graph, compile_part, require_compilers, row_encoder
from hetegen_rec.export.graph import ScoringGraph
from hetegen_rec.export.parity import compare, require_parity
from hetegen_rec.export.part_parity import compare_candidates, compare_integers
from hetegen_rec.export.parts import check_parts, parts_of
from hetegen_rec.export.reference import Reference
from hetegen_rec.export.strategies import Exported, build_strategies, needs_validation_rows, write_strategies
from hetegen_rec.files import whole_directory
from hetegen_rec.inference.building import TrainedModel
from hetegen_rec.locks import directory_lock
from hetegen_rec.models.embedding import table_shapes
from hetegen_rec.models.network import ClickNetwork
from hetegen_rec.scoring.layout import Layout
from hetegen_rec.scoring.manifest import (
    FORMAT_VERSION,
    Artifact,
    Manifest,
    TableGroup,
    describe_files,
    write_manifest,
)
from hetegen_rec.scoring.scorer import Scorer
from hetegen_rec.scoring.tables import make_groups, map_tables, writing
from hetegen_rec.scoring.vocabularies import write_vocabularies
from hetegen_rec.training.checkpoint import CheckpointInfo
from hetegen_rec.training.setup import model_of
from hetegen_rec.training.stored_tables import StoredWeights

logger = logging.getLogger(__name__)

PARITY_SPLIT: Split = "valid"
"""Whose first rows an artifact is held against the training model on."""
_HEADS = "reconstruction."
_ROWS_AT_ONCE = 1 << 16  # of a table that has grown, while its new rows are made


class Exporter:
    """Makes the artifact of one checkpoint, by one process, in memory that does not grow with the tables."""

    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        info: CheckpointInfo,
        statistics: Statistics,
        runtime: Runtime,
        open_split: Callable[[Split], Reader],
    ) -> None:
        """Opens a checkpoint.

        Args:
            config: of the run.
            stage: that wrote the checkpoint; one that scores clicks.
            info: the checkpoint, checked to be whole and of these data.
            statistics: of the training rows.
            runtime: of this one process.
            open_split: opens a split to read every row once, in order.

        Raises:
            ConfigError: the stage scores no clicks, a back end cannot be compiled on this machine, or these
                fields cannot have a graph that is asked for.
        """
        self._config, self._stage, self._info, self._statistics = config, stage, info, statistics
        if stage not in CLICK_STAGES:
            raise ConfigError(
                f"a model of `{stage}` scores no clicks; export one of {', '.join(CLICK_STAGES)}"
            )
        require_compilers(config.export.backends)
        check_parts(config.export, config.features, statistics)
        # What is exported is held against the training model on the CPU.
        self._runtime, self._open_split = replace(runtime, device=torch.device("cpu")), open_split
        self._weights = StoredWeights(info)
        self._layout = Layout(config.features)
        shapes = table_shapes(config.features, statistics, config.model.dim)
        self._dims = {shape.name: shape.dim for shape in shapes}
        self._rows = {shape.name: shape.num_rows for shape in shapes}
        self._batches = list(_first_rows(open_split(PARITY_SPLIT), config.export.parity_rows))

    def write(self, target: Path) -> Manifest:
        """Writes the artifact; it appears whole or not at all, in place of an earlier one.

        Raises:
            CheckpointError: the checkpoint does not fit the configuration.
            ParityError: a back end does not score as the training model does.
            LockedError: another process writes there.
        """
        with directory_lock(target), whole_directory(target) as root:
            return self._write(root)

    def _write(self, root: Path) -> Manifest:
        network = self._network()
        reference = Reference(self._config.features, self._dims, self._batches, self._others())
        groups = self._write_tables(root, reference)
        lookup = reference.lookup(network)
        strategies = build_strategies(
            TrainedModel(self._config, self._statistics, lookup, self._runtime, self._open_split)
        )
        manifest = self._describe(root, groups, strategies)
        self._compile(root, network, manifest)
        manifest = manifest.model_copy(update={"files": describe_files(root)})
        write_manifest(root, manifest)
        expected = {name: reference.score_by(one, lookup) for name, one in strategies.items()}
        parity = self._compare(root, reference.score(network), expected)
        manifest = manifest.model_copy(update={"parity": parity})
        write_manifest(root, manifest)
        return manifest

    def _write_tables(self, root: Path, reference: Reference) -> list[TableGroup]:
        """Writes every table, in one pass in which the reference takes the rows that it needs."""
        config = self._config.export
        groups = make_groups(self._dims, self._rows, config.tables, config.backends)
        encode = row_encoder(config.tables, config.backends, self._dims)
        with writing(root, groups, self._rows, encode) as writers:
            for table in self._dims:
                for first_row, rows in self._table(table):
                    writers[table].write(table, first_row, rows)
                    reference.take(table, first_row, rows)
        return groups

    def _describe(
        self, root: Path, groups: list[TableGroup], strategies: Mapping[ScoringStrategy, Exported]
    ) -> Manifest:
        """Writes what encodes and what strategies need; the manifest, still without back ends and files."""
        config, features, statistics = self._config.export, self._config.features, self._statistics
        return Manifest(
            format_version=FORMAT_VERSION,
            name=self._config.name,
            stage=self._stage,
            step=self._info.step,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions=_versions(),
            features=features,
            vocabularies=write_vocabularies(root, features, statistics, self._values()),
            precision=config.tables,
            dense=config.dense,
            tables=groups,
            backends={},
            strategies=["plain", *strategies],
            inference=write_strategies(
                root,
                strategies,
                statistics,
                list(self._dims),
                self._config.inference,
                self._config.stage(self._stage).oov_dropout,
            ),
            shared_fields=list(config.shared_fields),
            metrics=self._metrics(),
            parity={},
            files={},
        )

    def _compile(self, root: Path, network: ClickNetwork, manifest: Manifest) -> None:
        """Writes the network for every back end, and tells the manifest."""
        config = self._config.export
        for backend in config.backends:
            logger.info("compiling the network for %s", backend)
            graph = ScoringGraph(network, self._layout, self._dims, config.tables, config.dense, backend)
            tables = map_tables(Artifact(root, manifest), self._layout, backend)
            entry = compile_graph(graph, tables, backend, root)
            wanted = parts_of(graph, tables, config, self._statistics)
            parts = {name: compile_part(part, name, backend, root) for name, part in wanted.items()}
            manifest.backends[backend] = entry.model_copy(update={"parts": parts})

    def _network(self) -> ClickNetwork:
        """The trained network, of which only what scores is loaded."""
        network = model_of(self._config, self._stage, self._statistics).network.eval()
        # Heads that reconstruct score nothing, and have other sizes where vocabularies have grown.
        wanted = {name: value for name, value in network.state_dict().items() if not name.startswith(_HEADS)}
        stored = self._weights.dense({f"network.{name}": value for name, value in wanted.items()})
        network.load_state_dict({name: stored[f"network.{name}"] for name in wanted}, strict=False)
        return network

    def _others(self) -> Iterator[Batch]:
        """Batches that the training model looks up besides the sample."""
        if needs_validation_rows(self._config):
            yield from self._open_split("valid").epoch(Cursor())

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
        """What evaluation said of this checkpoint, scored plainly; empty if it was another, or none."""
        evaluation = read_evaluation(self._config.stage_dir(self._stage))
        if evaluation is None or evaluation["step"] != self._info.step:
            return {}
        return {
            split: {key: value for key, value in found.items() if isinstance(value, float | int)}
            for split, found in evaluation["splits"].items()
            if not strategy_note(found)
        }

    def _compare(
        self,
        root: Path,
        reference: NDArray[np.float32],
        by_strategy: Mapping[ScoringStrategy, NDArray[np.float32]],
    ) -> dict[str, Any]:
        """Scores the raw sample by every back end and refuses the artifact if one is beyond tolerance.

        Args:
            root: directory of the artifact.
            reference: [N] of the training model.
            by_strategy: [N] of the training model under each other strategy.
        """
        config = self._config.export
        labels = np.concatenate([batch.labels[batch.row_ids >= 0].numpy() for batch in self._batches])
        sample = self._raw_sample(len(labels))

        def gated(scores: NDArray[np.float32], expected: NDArray[np.float32], name: str) -> dict[str, Any]:
            found = compare(scores, expected, labels)
            require_parity(found, config, name)
            return found

        parity: dict[str, Any] = {}
        for backend in config.backends:
            scorer = Scorer.load(root, backend=backend)

            def scores(strategy: ScoringStrategy, scorer: Scorer = scorer) -> NDArray[np.float32]:
                return np.concatenate([scorer.score(rows, strategy) for rows in sample])

            found = {"split": PARITY_SPLIT, **gated(scores("plain"), reference, backend)}
            if by_strategy:
                found["strategies"] = {
                    name: gated(scores(name), expected, f"{backend}, strategy {name}")
                    for name, expected in by_strategy.items()
                }
            if config.shared_fields:
                found["shared_fields"] = compare_candidates(scorer, sample[0])
            if config.raw_integers:
                found["raw_integers"] = compare_integers(scorer, sample)
            parity[backend] = found
        return parity

    def _raw_sample(self, num_rows: int) -> list[pa.Table]:
        """The first raw rows that were prepared of the sample's split, as a caller would give them.

        Files may store a column in different ways, so they are several tables.
        """
        data = self._config.data
        left_out = {shard.where for shard in read_manifest(data.prepared_dir).skipped}
        paths = (path for path in expand_paths(data.raw_paths(PARITY_SPLIT)) if path not in left_out)
        groups = (group for path in paths for group in row_groups([(path, read_shape(path).group_rows)]))
        tables: list[pa.Table] = []
        for group in groups:
            if group.where in left_out:
                continue
            for table in iter_tables(group, self._config.features, labelled=False):
                tables.append(table.slice(0, num_rows))
                num_rows -= len(tables[-1])
                if not num_rows:
                    return tables
        return tables


def _first_rows(reader: Reader, num_rows: int) -> Iterator[Batch]:
    """Batches with the first rows of a reader, in order."""
    for batch in reader.epoch(Cursor()):
        yield batch
        num_rows -= int((batch.row_ids >= 0).sum())
        if num_rows <= 0:
            return


def _versions() -> dict[str, str]:
    """The version of the package, and where it runs from a checkout, the commit of that."""
    versions = {"hetegen_rec": metadata.version("hetegen-rec")}
    commit = describe_checkout(digits=40)
    return versions | {"commit": commit} if commit else versions
