"""Named runs that must agree: the same checkpoint and the same training on other ranks and plans."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from multirank import run_ranks
from tiny_run import tiny_config

from hetegen_rec.config.run import RunConfig
from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.evaluation.predictions import Predictions
from hetegen_rec.training import stages
from hetegen_rec.training.scoring import measure, score_rows
from hetegen_rec.training.setup import build_sharded, open_split

STEPS = 20
SCORED = "joint"
# Whole rows per step decide: in-batch candidates would be those of one rank.
FULL_SOFTMAX = (
    "model.reconstruction.full_softmax_max=100000",
    "data.lanes=2",
    "features.fields="
    "[{name: user_id, kind: id}, {name: item_id, kind: id}, {name: tags, kind: multi_valued, max_length: 3},"
    " {name: segment, kind: categorical}, {name: price, kind: numeric, num_buckets: 8},"
    " {name: history, kind: sequence, table: item_id, max_length: 3, reconstruct: false}]",
    f"train.max_steps={STEPS}",
)


@dataclass(frozen=True)
class NamedRun:
    ranks: int
    sharding: str
    stage: str | None = None
    """The stage to train; None scores the common checkpoint."""

    @property
    def name(self) -> str:
        return f"{self.stage or 'score'}-{self.sharding}-{self.ranks}"


RUNS = (
    NamedRun(1, "table_wise"),
    NamedRun(2, "table_wise"),
    NamedRun(2, "column_wise"),
    NamedRun(2, "row_wise"),
    NamedRun(3, "table_wise"),
    NamedRun(3, "column_wise"),
    NamedRun(3, "row_wise"),
    NamedRun(1, "table_wise", "joint"),
    NamedRun(2, "table_wise", "joint"),
    NamedRun(2, "row_wise", "joint"),
    NamedRun(1, "table_wise", "pretrain"),
    NamedRun(2, "table_wise", "pretrain"),
)
SCORING = [run for run in RUNS if run.stage is None and run.ranks > 1]
TRAINING = [run for run in RUNS if run.stage is not None and run.ranks > 1]


def base_of(run: NamedRun) -> str:
    return NamedRun(1, "table_wise", run.stage).name


def carry_out(directory: Path, num_ranks: int) -> dict[str, Any]:
    """All runs of the table on so many ranks, one after another in one job; what this rank saw."""
    seen = {}
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        for run in RUNS:
            if run.ranks == num_ranks:
                seen[run.name] = (
                    _train(directory, run, runtime) if run.stage else _score(directory, run, runtime)
                )
    return seen


def _train(directory: Path, run: NamedRun, runtime: Runtime) -> dict[str, Any]:
    config = tiny_config(
        directory / run.name,
        f"data.raw_dir={directory / 'raw'}",
        f"data.prepared_dir={directory / 'prepared_full_softmax'}",  # by one rank: its cut into files matters
        *FULL_SOFTMAX,
        _planned(run.sharding),
    )
    with stages.open_trainer(config, run.stage, runtime) as trainer:
        trainer.run()
    log = config.stage_dir(run.stage) / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {
        "steps": trainer.state.step,
        "losses": [line["loss"] for line in lines if line["event"] == "train"],
        "auc": [line["auc"] for line in lines if line["event"] == "evaluation"],
        "difficulty": trainer.model.network.difficulty.scalars.detach().numpy().copy(),
        "plan": sorted({table.sharding for table in trainer.model.plan}),
    }


def _score(directory: Path, run: NamedRun, runtime: Runtime) -> dict[str, Any]:
    config = tiny_config(directory, _planned(run.sharding))
    statistics = stages.prepare_data(config, runtime)
    model = build_sharded(config, SCORED, statistics, runtime)
    checkpoints = stages.open_checkpoints(config, SCORED, statistics, runtime)
    checkpoints.load(checkpoints.latest(), model.dmp)
    reader = open_split(config, "test", statistics, runtime, stage=SCORED)
    predictions: Predictions = score_rows(model.dmp, reader, runtime)
    return {
        "scores": dict(zip(predictions.rows.row_ids.tolist(), predictions.rows.probabilities, strict=True)),
        "metrics": measure(predictions, config, statistics, runtime),
        "plan": sorted({table.sharding for table in model.plan}),
    }


def _planned(sharding: str) -> str:
    return f"distributed.tables={{default: {{sharding: [{sharding}]}}}}"


def _train_common_checkpoint(config: RunConfig) -> None:
    with start_runtime("cpu") as runtime:
        stages.run_stage(config, SCORED, runtime)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By run: what every rank saw."""
    directory = tmp_path_factory.mktemp("ranks")
    # Large enough tables and learning rates that rows differ in their scores.
    _train_common_checkpoint(tiny_config(directory, "stages.joint.epochs=1", "stages.joint.table_lr=0.2"))
    found: dict[str, list[Any]] = {}
    for num_ranks in (1, 2, 3):
        if num_ranks == 1:
            by_rank = [carry_out(directory, 1)]
        else:
            by_rank = run_ranks(num_ranks, carry_out, directory, num_ranks)
        for name in by_rank[0]:
            found[name] = [seen[name] for seen in by_rank]
    return found


def scores_of(seen: list[Any]) -> tuple[list[int], np.ndarray]:
    pairs = sorted(pair for rank in seen for pair in rank["scores"].items())
    return [row for row, _ in pairs], np.array([score for _, score in pairs])


@pytest.mark.parametrize("run", SCORING, ids=lambda run: run.name)
def test_one_checkpoint_scores_alike_on_any_ranks_and_plan(run, outcomes):
    rows, scores = scores_of(outcomes[run.name])
    base_rows, base_scores = scores_of(outcomes[base_of(run)])
    assert run.sharding in outcomes[run.name][0]["plan"]
    assert rows == base_rows == list(range(300))
    assert base_scores.std() > 0.01
    np.testing.assert_allclose(scores, base_scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("run", SCORING, ids=lambda run: run.name)
def test_evaluation_is_the_same_on_any_ranks_and_plan(run, outcomes):
    base = outcomes[base_of(run)][0]["metrics"]
    for seen in outcomes[run.name]:
        metrics = seen["metrics"]
        assert {name: (part["n"], part["positives"]) for name, part in metrics["slices"].items()} == {
            name: (part["n"], part["positives"]) for name, part in base["slices"].items()
        }
        for name in ("auc", "log_loss", "gauc", "normalized_entropy", "calibration"):
            assert metrics[name] == pytest.approx(base[name], abs=1e-6), name
    assert all(seen["metrics"] == outcomes[run.name][0]["metrics"] for seen in outcomes[run.name])


@pytest.mark.parametrize("run", TRAINING, ids=lambda run: run.name)
def test_the_same_global_batches_train_alike_on_any_ranks_and_plan(run, outcomes):
    base, seen = outcomes[base_of(run)][0], outcomes[run.name][0]
    assert run.sharding in seen["plan"]
    assert seen["steps"] == len(seen["losses"]) == len(base["losses"]) == STEPS
    assert base["losses"][-1] < base["losses"][0]
    np.testing.assert_allclose(seen["losses"], base["losses"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(seen["auc"], base["auc"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("run", TRAINING, ids=lambda run: run.name)
def test_difficulty_is_the_same_on_every_rank(run, outcomes):
    first, *others = [seen["difficulty"] for seen in outcomes[run.name]]
    assert others
    assert np.abs(first).max() > 0.01
    for other in others:
        np.testing.assert_array_equal(other, first)
    np.testing.assert_allclose(first, outcomes[base_of(run)][0]["difficulty"], atol=1e-4, rtol=0)
