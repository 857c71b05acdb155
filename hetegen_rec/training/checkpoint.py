"""Checkpoints as they are read: which are complete and intact, what they say, and loading one.

A checkpoint is a directory `step-N` of DCP's shards. It exists once its `metadata.json` does, which holds
size and SHA-256 of every other file and of itself, and it loads on any number of ranks and under any plan.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from hetegen_rec.config.schema import Schema
from hetegen_rec.data.vocabulary import TableIdentity
from hetegen_rec.distributed.optimizer_state import canonical_optimizer_state
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.distributed.sharding import global_shape, tables_in
from hetegen_rec.models.reconstruction import vocabulary_parameters
from hetegen_rec.sealing import unsealed
from hetegen_rec.training.checkpoint_store import Store, damaged_files
from hetegen_rec.training.load_plan import (
    GrowingLoadPlanner,
    grown_parameters,
    optimizer_state_mismatch,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT_VERSION = 3
METADATA = "metadata.json"
_STEP = re.compile(r"step-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint is absent, incomplete, or of another model. The message says which and what to do."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself."""

    location: str
    """Its directory or URL."""
    step: int
    fingerprint: str
    """Of the schema that the model was built from."""
    world_size: int
    """Ranks that wrote it."""
    tables: dict[str, tuple[int, int]]
    """Rows and columns of every table."""
    identities: dict[str, TableIdentity]
    """Which value each row of a table stands for, as far as it was known."""
    optimizer_state: dict[str, tuple[int, ...]]
    """Shape of every tensor of the optimizer's state."""
    best: dict[str, Any] | None
    """`metric` and `value`, if none before was better when it was written."""
    files: dict[str, dict[str, Any]]
    """`bytes` and `sha256` of every file beside `metadata.json`."""
    metadata: dict[str, Any]
    """What the trainer put beside it: stage, progress, metrics, plan."""


def full_schema_fingerprint(schema: Schema) -> str:
    """Digest of everything in a schema, equal for equal schemas only."""
    text = json.dumps(schema.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def step_name(step: int) -> str:
    """Name of the directory of a step's checkpoint."""
    return f"step-{step}"


def read_info(location: str) -> CheckpointInfo:
    """What a checkpoint says about itself, read without loading it.

    Args:
        location: its directory or URL.

    Raises:
        CheckpointError: no complete checkpoint of this format lies there.
    """
    try:
        values = unsealed(Store(location).read_text(METADATA))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{location}: no complete checkpoint ({METADATA}: {error}); name a directory `step-N` that a "
            "training run finished writing"
        ) from error
    if values.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{location}: checkpoint format {values.get('format')}, but this version reads {FORMAT_VERSION}; "
            "load it with the version of hetegen_rec that wrote it"
        )
    return CheckpointInfo(
        location=location,
        step=values["step"],
        fingerprint=values["fingerprint"],
        world_size=values["world_size"],
        tables={name: (rows, dim) for name, (rows, dim) in values["tables"].items()},
        identities={name: TableIdentity.from_json(known) for name, known in values["identities"].items()},
        optimizer_state={key: tuple(shape) for key, shape in values["optimizer_state"].items()},
        best=values["best"],
        files=values["files"],
        metadata=values["metadata"],
    )


class Checkpoints:
    """The checkpoints of one stage in one place that all ranks share.

    All methods are collectives. A failure on one rank is raised on every rank. A checkpoint contains a
    pickle (PyTorch's `.metadata`): load only those from a place that you trust.
    """

    def __init__(
        self,
        location: str,
        runtime: Runtime,
        fingerprint: str,
        identities: Mapping[str, TableIdentity] = MappingProxyType({}),
    ) -> None:
        """Opens a place, which need not exist.

        Args:
            location: directory or URL; holds `step-N` directories.
            runtime: this process's view of the job.
            fingerprint: of the schema of the model at hand, see `full_schema_fingerprint`.
            identities: by table, which value each of its rows stands for.
        """
        self.store = Store(location)
        self.fingerprint = fingerprint
        self.identities = dict(identities)
        self._runtime = runtime

    def latest(self) -> CheckpointInfo | None:
        """The intact checkpoint of the most steps; None if none was ever finished here.

        Those that are damaged are passed over, each with a warning.

        Raises:
            CheckpointError: all are damaged, or the place cannot be read. Who took that for an empty place
                would train anew, and remove what is there.
        """
        steps = self._on_main(self.store.location, lambda: complete_steps(self.store))
        for step in reversed(steps):
            try:
                return self.check(self.store.path(step_name(step)))
            except CheckpointError as error:
                if self._runtime.is_main:
                    logger.warning("%s; passed over", error)
        if steps:
            raise CheckpointError(
                f"{self.store.location}: none of its {len(steps)} checkpoint(s) can be read, as told before. "
                "Restore one of them, or start the stage anew with --fresh"
            )
        return None

    def best(self) -> CheckpointInfo | None:
        """The checkpoint of the best evaluation; the newest where none is, or that one is damaged.

        Raises:
            CheckpointError: as `latest`.
        """
        step = self._on_main(self.store.location, lambda: best_step(self.store))
        if step is None:
            return self.latest()
        try:
            return self.check(self.store.path(step_name(step)))
        except CheckpointError as error:
            if self._runtime.is_main:
                logger.warning("%s; this was the best one, the newest intact one stands in for it", error)
            return self.latest()

    def clear(self) -> None:
        """Removes all checkpoints here; for rank 0 only."""
        for step in written_steps(self.store):
            self.store.remove_directory(step_name(step))

    def check(self, location: str) -> CheckpointInfo:
        """Reads every file of a checkpoint, the ranks sharing the work.

        Args:
            location: directory or URL of a checkpoint, of this stage or any other.

        Raises:
            CheckpointError: on every rank; it is incomplete, or a file is cut off or changed.
        """
        info = self._on_main(location, lambda: read_info(location))
        mine = sorted(info.files)[self._runtime.rank :: self._runtime.world_size]
        problems = list(damaged_files(Store(location), {name: info.files[name] for name in mine}))
        found = [problem for part in self._runtime.gather(problems) for problem in part]
        if found:
            raise CheckpointError(f"{location}: damaged: {'; '.join(found)}")
        return info

    def load(
        self,
        info: CheckpointInfo,
        model: DistributedModelParallel,
        optimizer: KeyedOptimizer | None = None,
        unread: Sequence[str] = (),
    ) -> None:
        """Loads weights into a model, and the optimizer's state where one is given.

        The number of ranks and the plan may differ from those that wrote it. A table may have grown since by
        new ids behind the old ones: their rows, and those of the heads, stay as they are.

        Args:
            info: from `latest`, `best` or `check`.
            model: the sharded model, its weights initialised.
            optimizer: None loads the weights only, as fine-tuning does.
            unread: beginnings of the names of weights that stay as they are, and may have other shapes there.

        Raises:
            CheckpointError: of another schema or model, or with an optimizer state that this plan cannot
                take over. Nothing is loaded then, unless files are damaged.
        """
        whole = model.state_dict()
        state: dict[str, Any] = {
            "model": {key: value for key, value in whole.items() if not key.startswith(tuple(unread))}
        }
        tables = {name: global_shape(weights) for name, weights in tables_in(state["model"]).items()}
        shapes: dict[str, tuple[int, ...]] = {}
        if optimizer is not None:
            own = optimizer.state_dict()
            state["optimizer"] = canonical_optimizer_state(own)
            shapes = shapes_over_ranks(state["optimizer"], self._runtime)
        self.check_tables(info, tables)
        self._check_parameters(info, whole, unread)
        stored_rows = {name: rows for name, (rows, _) in info.tables.items()}
        grown = grown_parameters(state["model"], vocabulary_parameters(model.module), stored_rows)
        if optimizer is not None:
            mismatch = optimizer_state_mismatch(info.optimizer_state, shapes, grown)
            if mismatch:
                raise CheckpointError(f"{info.location}: {mismatch}")
        try:
            load_shards(
                state,
                storage_reader=Store(info.location).reader(),
                planner=GrowingLoadPlanner(grown),
                process_group=self._runtime.host_group,
            )
        except CheckpointException as error:
            raise CheckpointError(
                f"{info.location}: does not fit this model, or is damaged: {causes(error)}; use the model "
                "section of the configuration that the checkpoint was trained with"
            ) from error
        model.load_state_dict(whole | state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(own)
            if isinstance(optimizer, CombinedOptimizer):
                # Fused optimizers count steps outside of their state; Adam and LAMB correct moments by it.
                optimizer.set_optimizer_step(info.step)

    def grown_tables(self, info: CheckpointInfo) -> dict[str, int]:
        """The tables that have got new ids since, and their rows in the checkpoint."""
        return {
            name: info.tables[name][0]
            for name, identity in self.identities.items()
            if name in info.identities and identity.grown_from(info.identities[name])
        }

    def check_tables(self, info: CheckpointInfo, here: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses tables of another size, unless they have grown, and ids that stand for other values."""
        grown = {name for name in self.grown_tables(info) if info.tables[name][1:] == here[name][1:]}
        differences = [
            f"table {name} {_size(info.tables.get(name))} there, {_size(here.get(name))} here"
            for name in sorted({*info.tables, *here} - grown)
            if info.tables.get(name) != here.get(name)
        ]
        if not differences and info.fingerprint != self.fingerprint:
            differences = [
                f"fingerprint {info.fingerprint} there, {self.fingerprint} here, with equal tables"
            ]
        if not differences:
            differences = [
                f"the rows of table {name} stand for other values"
                for name, identity in self.identities.items()
                if identity != info.identities.get(name) and name not in grown
            ]
        if differences:
            raise CheckpointError(
                f"{info.location}: checkpoint of another schema or of other data: {'; '.join(differences)}. "
                "Use the configuration and the prepared data that it was trained with, or prepare newer data "
                "with `data.keep_ids_of`, which keeps the ids"
            )

    def _check_parameters(self, info: CheckpointInfo, here: Mapping[str, Any], unread: Sequence[str]) -> None:
        """Refuses a checkpoint with parameters that the model lacks, which DCP would pass over."""
        reader = Store(info.location).reader()
        stored = self._on_main(info.location, lambda: list(reader.read_metadata().state_dict_metadata))
        there = {key.removeprefix("model.") for key in stored if key.startswith("model.")}
        spare = sorted(key for key in there - set(here) if not key.startswith(tuple(unread)))
        if spare:
            raise CheckpointError(
                f"{info.location}: does not fit this model, which lacks {spare[0]} "
                f"and {len(spare) - 1} more parameters of the stored one; use the model section of the "
                "configuration that the checkpoint was trained with"
            )

    def _on_main(self, location: str, read: Callable[[], T]) -> T:
        """What rank 0 finds at a location, on every rank; its errors too."""
        found: T | None = None
        error: CheckpointError | None = None
        if self._runtime.is_main:
            try:
                found = read()
            except CheckpointError as raised:
                error = raised
            except Exception as raised:  # stores have errors of their own, not all of which can be pickled
                error = CheckpointError(f"{location}: cannot be read: {type(raised).__name__}: {raised}")
        found, error = self._runtime.broadcast((found, error))
        if error is not None:
            raise error
        return cast(T, found)


def complete_steps(store: Store) -> list[int]:
    """Steps of the checkpoints that were written to their end, ascending."""
    return sorted(step for step in written_steps(store) if store.exists(f"{step_name(step)}/{METADATA}"))


def written_steps(store: Store) -> Iterator[int]:
    """Steps of all checkpoints here, also those that were begun only."""
    for name in store.directories():
        match = _STEP.fullmatch(name)
        if match:
            yield int(match.group(1))


def best_step(store: Store) -> int | None:
    """Step of the best checkpoint: the newest that none before was better than."""
    for step in reversed(complete_steps(store)):
        try:
            if read_info(store.path(step_name(step))).best is not None:
                return step
        except CheckpointError as error:
            logger.warning("%s; it may have been the best one", error)
    return None


def shapes_over_ranks(state: Mapping[str, Any], runtime: Runtime) -> dict[str, tuple[int, ...]]:
    """Shapes of a whole state; a rank knows only the tables of which it holds a part. A collective."""
    parts = runtime.gather(_tensor_shapes(state))
    return {key: shape for part in parts for key, shape in part.items()}


def causes(error: CheckpointException) -> str:
    """What went wrong on which rank."""
    return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in sorted(error.failures.items()))


def _tensor_shapes(state: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for key, value in state.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping):
            shapes.update(_tensor_shapes(value, path))
        elif isinstance(value, torch.Tensor | ShardedTensor):
            shapes[path] = global_shape(value)
    return shapes


def _size(shape: tuple[int, ...] | None) -> str:
    return "is absent" if shape is None else f"has {shape[0]:,} rows of {shape[1]}"
