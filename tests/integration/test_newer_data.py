"""Newer data with older ids: what was trained on the older ones goes on, on other ranks and plans."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from multirank import run_ranks
from tiny_run import tiny_config
from torch.distributed._shard.sharded_tensor.api import ShardedTensor

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.run import RunConfig
from hetegen_rec.config.schema import NUM_RESERVED_IDS
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.distributed.optimizer_state import canonical_optimizer_state
from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.training import stages
from hetegen_rec.training.checkpoint import CheckpointError
from hetegen_rec.training.trainer import Trainer

STAGE = "joint"
TABLE = "user_id"
WEIGHT = f"ebc.embedding_bags.{TABLE}.weight"
HEAD = f"network.reconstruction.full.classes.{TABLE}.weight"
KINDS = ("table_wise", "row_wise", "data_parallel")


def may(directory: Path, *overrides: str) -> RunConfig:
    return tiny_config(directory / "may", "train.max_steps=4", *overrides)


def june(directory: Path, *overrides: str) -> RunConfig:
    return tiny_config(
        directory / "june",
        "data.source.seed=5",
        f"data.keep_ids_of={directory / 'may' / 'prepared'}",
        "train.max_steps=2",
        *overrides,
    )


def rows_of(tensor: ShardedTensor | torch.Tensor | None, runtime: Runtime) -> np.ndarray:
    """All rows of a tensor, which on a rank without a part of it may be unknown."""
    if isinstance(tensor, torch.Tensor) and not isinstance(tensor, ShardedTensor):
        return tensor.detach().numpy().copy()
    shards = [] if tensor is None else tensor.local_shards()
    mine = [(shard.metadata.shard_offsets[0], shard.tensor.numpy().copy()) for shard in shards]
    parts = sorted((part for rank in runtime.gather(mine) for part in rank), key=lambda part: part[0])
    return np.concatenate([rows for _, rows in parts])


def look(trainer: Trainer, runtime: Runtime) -> dict[str, np.ndarray]:
    """The users' rows of table, accumulators, head and the head's moments."""
    weights = trainer.model.dmp.state_dict()
    state = canonical_optimizer_state(trainer.optimizer.state_dict())["state"]
    return {
        "weight": rows_of(weights[WEIGHT], runtime),
        "accumulator": rows_of(state.get(WEIGHT, {}).get(f"{TABLE}.momentum1"), runtime),
        "head": rows_of(weights[HEAD], runtime),
        "moment": rows_of(state[HEAD]["exp_avg"], runtime),
    }


def go_on(directory: Path, start_from: str) -> dict[str, Any]:
    """By sharding: what a run on newer data starts with, from nothing and from the checkpoint."""
    seen: dict[str, Any] = {}
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        for kind in KINDS:
            plan = f"distributed.tables={{default: {{sharding: [{kind}]}}}}"
            here = f"run_dir={directory / kind}"
            with stages.open_trainer(june(directory, plan, here), STAGE, runtime) as trainer:
                fresh = look(trainer, runtime)
            config = june(directory, plan, here, f"stages.{STAGE}.start_from={start_from}")
            with stages.open_trainer(config, STAGE, runtime, fresh=True) as trainer:
                loaded = look(trainer, runtime)
                trainer.run()
                seen[kind] = {"fresh": fresh, "loaded": loaded, "steps": trainer.state.step}
    return seen


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("growth")


@pytest.fixture(scope="module")
def trained(directory: Path) -> dict[str, Any]:
    """Where the checkpoint of the older data lies, and what it holds; the newer data are prepared."""
    with start_runtime("cpu") as runtime:
        with stages.open_trainer(may(directory), STAGE, runtime) as trainer:
            trainer.run()
            seen = look(trainer, runtime)
        newer = stages.prepare_data(june(directory), runtime)
        older = Statistics.load(may(directory).data.prepared_dir)
        latest = stages.open_checkpoints(may(directory), STAGE, older, runtime).latest()
    assert latest is not None
    return {"at": latest.location, "rows": seen, "grown": (older.table_rows(TABLE), newer.table_rows(TABLE))}


def test_training_goes_on_with_the_old_rows_and_fresh_new_ones(
    directory: Path, trained: dict[str, Any]
) -> None:
    before, after = trained["grown"]
    assert before < after
    for seen in run_ranks(2, go_on, directory, trained["at"]):
        for kind, found in seen.items():
            assert found["steps"] == 2
            for name, rows in found["loaded"].items():
                of_values = name in ("head", "moment")
                old, new = (size - NUM_RESERVED_IDS * of_values for size in (before, after))
                assert len(rows) == new, (kind, name)
                assert np.array_equal(rows[:old], trained["rows"][name]), (kind, name)
                assert np.array_equal(rows[old:], found["fresh"][name][old:]), (kind, name)
            assert found["loaded"]["accumulator"].any()
            assert not found["loaded"]["accumulator"][before:].any()


def test_a_field_that_outgrows_its_full_softmax_is_refused_by_name(
    directory: Path, trained: dict[str, Any]
) -> None:
    most = trained["grown"][0] - NUM_RESERVED_IDS
    config = june(
        directory,
        f"model.reconstruction.full_softmax_max={most}",
        f"stages.{STAGE}.start_from={trained['at']}",
    )
    with (
        start_runtime("cpu") as runtime,
        pytest.raises(ConfigError, match=f"'{TABLE}'.*full_softmax_max: {most}"),
        stages.open_trainer(config, STAGE, runtime),
    ):
        pass


@pytest.mark.parametrize("backbone", ["fm", "hetegen"])
def test_from_scratch_there_is_no_softmax_to_outgrow(
    directory: Path, trained: dict[str, Any], backbone: str
) -> None:
    most = trained["grown"][0] - NUM_RESERVED_IDS
    settings = (
        f"model.backbone.name={backbone}",
        f"model.reconstruction.full_softmax_max={most}",
        "train.max_steps=1",
        f"run_dir={directory / backbone}",
    )
    with start_runtime("cpu") as runtime:
        with stages.open_trainer(may(directory, *settings), "scratch", runtime) as trainer:
            trainer.run()
        older = stages.open_checkpoints(may(directory, *settings), "scratch", trainer.statistics, runtime)
        start = older.latest()
        assert start is not None
        config = june(directory, *settings, f"stages.scratch.start_from={start.location}")
        with stages.open_trainer(config, "scratch", runtime, fresh=True) as trainer:
            assert trainer.statistics.table_rows(TABLE) == trained["grown"][1]


def test_newer_data_with_ids_of_their_own_are_refused(directory: Path, trained: dict[str, Any]) -> None:
    config = june(
        directory,
        "data.keep_ids_of=null",
        f"data.prepared_dir={directory / 'alone'}",
        f"stages.{STAGE}.start_from={trained['at']}",
    )
    with (
        start_runtime("cpu") as runtime,
        pytest.raises(CheckpointError, match=f"table {TABLE}"),
        stages.open_trainer(config, STAGE, runtime),
    ):
        pass
