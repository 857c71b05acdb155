"""Checkpoints: sharded, complete or absent, and loadable on any number of ranks and under any plan."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from hetegen_rec.config.schema import Schema
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.distributed.sharding import global_shape, table_weights
from hetegen_rec.files import replace_directory, write_whole

FORMAT_VERSION = 1

_METADATA = "metadata.json"
_BEST = "best.json"
_STEP = re.compile(r"step-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint is absent, incomplete, or of another model. The message says which and what to do."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself."""

    path: Path
    step: int
    fingerprint: str
    """Of the schema that the model was built from."""
    world_size: int
    """Ranks that wrote it."""
    tables: dict[str, tuple[int, int]]
    """Rows and columns of every table."""
    optimizer_state: dict[str, tuple[int, ...]]
    """Shape of every tensor of the optimizer's state."""
    metadata: dict[str, Any]
    """What the trainer put beside it: stage, epoch, metrics, plan."""


def schema_fingerprint(schema: Schema) -> str:
    """Digest of everything in a schema, equal for equal schemas only."""
    text = json.dumps(schema.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_info(path: Path) -> CheckpointInfo:
    """What a checkpoint says about itself, read without loading it.

    Raises:
        CheckpointError: no complete checkpoint of this format stands there.
    """
    try:
        values = json.loads((path / _METADATA).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path}: no complete checkpoint ({_METADATA}: {error}); name a directory `step-N` that a "
            "training run finished writing"
        ) from error
    if values.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {values.get('format')}, but this version reads {FORMAT_VERSION}; "
            "load it with the version of hetegen_rec that wrote it"
        )
    return CheckpointInfo(
        path=path,
        step=values["step"],
        fingerprint=values["fingerprint"],
        world_size=values["world_size"],
        tables={name: (rows, dim) for name, (rows, dim) in values["tables"].items()},
        optimizer_state={key: tuple(shape) for key, shape in values["optimizer_state"].items()},
        metadata=values["metadata"],
    )


class Checkpoints:
    """The checkpoints of one stage in one directory, on a file system that all ranks share.

    All methods are collectives. A failure on one rank is raised on every rank. A checkpoint contains a
    pickle (PyTorch's `.metadata`): load only those from a place that you trust.
    """

    def __init__(self, directory: Path, runtime: Runtime, keep: int, fingerprint: str) -> None:
        """Opens a directory, which need not exist.

        Args:
            directory: holds `step-N` directories and `best.json`.
            runtime: this process's view of the job.
            keep: newest checkpoints that stay, besides the best.
            fingerprint: of the schema of the model at hand, see `schema_fingerprint`.
        """
        self._directory = directory
        self._runtime = runtime
        self._keep = keep
        self._fingerprint = fingerprint

    def save(
        self,
        step: int,
        model: DistributedModelParallel,
        optimizer: KeyedOptimizer,
        metadata: Mapping[str, Any],
    ) -> Path:
        """Writes `step-N`, whole or not at all, then removes checkpoints that are no longer kept.

        Args:
            step: steps taken; a checkpoint of the same step is replaced.
            model: the sharded model.
            optimizer: from `make_optimizer`.
            metadata: JSON values to keep beside it: stage, epoch, metrics, plan.

        Returns:
            The directory.

        Raises:
            CheckpointError or OSError: it could not be written; nothing is left under `step-N`.
        """
        final = self._directory / f"step-{step}"
        partial = self._directory / f"step-{step}.tmp"
        with self._runtime.together(f"making {partial}"):
            if self._runtime.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        try:
            save_shards(state, checkpoint_id=partial, process_group=self._runtime.host_group)
        except CheckpointException as error:
            raise CheckpointError(f"{partial}: could not be written: {_causes(error)}") from error
        description = {
            "format": FORMAT_VERSION,
            "step": step,
            "fingerprint": self._fingerprint,
            "world_size": self._runtime.world_size,
            "tables": {name: list(global_shape(weights)) for name, weights in table_weights(model).items()},
            "optimizer_state": self._optimizer_shapes(optimizer),
            "metadata": dict(metadata),
        }
        with self._runtime.together(f"finishing {final}"):
            if self._runtime.is_main:
                _write_json(partial / _METADATA, description)
                replace_directory(partial, final)
                self._prune()
        return final

    def mark_best(self, step: int, metric: str, value: float) -> None:
        """Names a saved step the best so far, which protects it from removal."""
        with self._runtime.together("marking the best checkpoint"):
            if self._runtime.is_main:
                read_info(self._directory / f"step-{step}")
                _write_json(self._directory / _BEST, {"step": step, "metric": metric, "value": value})

    def latest(self) -> Path | None:
        """The complete checkpoint of the most steps; None if there is none."""
        steps = self._complete_steps() if self._runtime.is_main else []
        return self._runtime.broadcast(self._directory / f"step-{steps[-1]}" if steps else None)

    def best(self) -> Path | None:
        """The checkpoint that `mark_best` named last; None if there is none."""
        step = self._best_step() if self._runtime.is_main else None
        return self._runtime.broadcast(None if step is None else self._directory / f"step-{step}")

    def load(
        self, path: Path, model: DistributedModelParallel, optimizer: KeyedOptimizer | None = None
    ) -> CheckpointInfo:
        """Loads weights into a model, and the optimizer's state where one is given.

        The number of ranks and the plan may differ from those that wrote it.

        Args:
            path: a `step-N` directory, of this stage or another.
            model: the sharded model, its weights initialised.
            optimizer: None loads the weights only, as fine-tuning does.

        Returns:
            What the checkpoint says about itself.

        Raises:
            CheckpointError: incomplete, of another schema or model, or with an optimizer state that this
                plan cannot take over. Nothing is loaded then, unless files are damaged.
        """
        state: dict[str, Any] = {"model": model.state_dict()}
        tables = {name: global_shape(weights) for name, weights in table_weights(model).items()}
        shapes: dict[str, tuple[int, ...]] = {}
        if optimizer is not None:
            state["optimizer"] = optimizer.state_dict()
            shapes = self._optimizer_shapes(optimizer)
        with self._runtime.together(f"reading {path}"):
            info = read_info(path)
            _check_tables(info, tables, self._fingerprint)
            if optimizer is not None:
                _check_optimizer(info, shapes)
        try:
            load_shards(state, checkpoint_id=path, process_group=self._runtime.host_group)
        except CheckpointException as error:
            raise CheckpointError(
                f"{path}: does not fit this model, or is damaged: {_causes(error)}; use the model section "
                "of the configuration that the checkpoint was trained with"
            ) from error
        model.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
        return info

    def _optimizer_shapes(self, optimizer: KeyedOptimizer) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole state; a rank knows only the tables of which it holds a part."""
        parts = self._runtime.gather(_tensor_shapes(optimizer.state_dict()))
        return {key: shape for part in parts for key, shape in part.items()}

    def _complete_steps(self) -> list[int]:
        found = (_STEP.fullmatch(path.parent.name) for path in self._directory.glob(f"step-*/{_METADATA}"))
        return sorted(int(match.group(1)) for match in found if match)

    def _best_step(self) -> int | None:
        path = self._directory / _BEST
        if not path.exists():
            return None
        return int(json.loads(path.read_text(encoding="utf-8"))["step"])

    def _prune(self) -> None:
        best = self._best_step()
        for step in self._complete_steps()[: -self._keep]:
            if step != best:
                shutil.rmtree(self._directory / f"step-{step}")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(values, indent=1))


def _tensor_shapes(state: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for key, value in state.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping):
            shapes.update(_tensor_shapes(value, path))
        elif isinstance(value, torch.Tensor | ShardedTensor):
            shapes[path] = global_shape(value)
    return shapes


def _check_tables(info: CheckpointInfo, here: Mapping[str, tuple[int, ...]], fingerprint: str) -> None:
    differences = [
        f"table {name} {_size(info.tables.get(name))} there, {_size(here.get(name))} here"
        for name in sorted({*info.tables, *here})
        if info.tables.get(name) != here.get(name)
    ]
    if not differences and info.fingerprint != fingerprint:
        differences = [f"fingerprint {info.fingerprint} there, {fingerprint} here, with equal tables"]
    if differences:
        raise CheckpointError(
            f"{info.path}: checkpoint of another schema: {'; '.join(differences)}. Use the configuration "
            "and the prepared data that it was trained with"
        )


def _size(shape: tuple[int, ...] | None) -> str:
    return "is absent" if shape is None else f"has {shape[0]:,} rows of {shape[1]}"


def _check_optimizer(info: CheckpointInfo, here: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses states whose shape depends on a plan that has changed, which would load in part only."""
    there = info.optimizer_state
    for key in sorted({*there, *here}):
        if there.get(key) != here.get(key):
            raise CheckpointError(
                f"{info.path}: optimizer state {key} has shape {there.get(key, 'none')} there, "
                f"{here.get(key, 'none')} here: the table optimizer, or the sharding of a table "
                "(data_parallel, column_wise), has changed. Restore it under train.table_optimizer and "
                "distributed.tables, or start the optimizer anew from the weights"
            )


def _causes(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in sorted(error.failures.items()))
