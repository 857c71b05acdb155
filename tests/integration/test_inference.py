"""Test-time strategies on a trained run: the same scores on any ranks, honest accounts, clear refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from multirank import run_ranks
from tiny_run import tiny_config, write_tiny

from hetegen_rec.cli import main
from hetegen_rec.config.run import RunConfig
from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.evaluation.results import read_evaluation
from hetegen_rec.inference.building import SKETCH_FILE
from hetegen_rec.training import stages
from hetegen_rec.training.scoring import open_scorer, score_rows_by
from hetegen_rec.training.setup import build_sharded, open_split

TRAINED = (
    "stages.joint.epochs=1",
    "stages.scratch.epochs=1",
    "stages.joint.table_lr=0.2",  # so that rows differ in their scores
    "model.reconstruction.full_softmax_max=100",  # users and items have a sampled softmax
)
STRATEGIES = {
    "symmetric": ("inference.symmetric.rounds=2",),
    "feature_paths": ("inference.feature_paths.paths=3", "inference.feature_paths.sketch_mb=4"),
    "uncertainty": ("inference.uncertainty.paths=4",),
}
PLAIN = {"strategy": "plain", "passes_per_row": 1.0, "time_multiple": 1.0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `joint` and `scratch` are trained and evaluated plainly."""
    made = tmp_path_factory.mktemp("inference")
    assert run("joint", made) == 0
    assert run("scratch", made) == 0
    return made


def run(verb: str, directory: Path, *arguments: str) -> int:
    return main([verb, "--config", str(write_tiny(directory)), *TRAINED, *arguments])


def chosen(strategy: str) -> tuple[str, ...]:
    return (f"inference.strategy={strategy}", *STRATEGIES.get(strategy, ()))


def score_on_ranks(directory: Path) -> dict[str, Any]:
    """By strategy: this rank's scores of the test rows by row id, and the account."""
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        return {name: _score(tiny_config(directory, *TRAINED, *chosen(name)), runtime) for name in STRATEGIES}


def _score(config: RunConfig, runtime: Runtime) -> tuple[dict[int, float], dict[str, Any]]:
    statistics = stages.prepare_data(config, runtime)
    model = build_sharded(config, "joint", statistics, runtime)
    checkpoints = stages.open_checkpoints(config, "joint", statistics, runtime)
    checkpoints.load(checkpoints.latest(), model.dmp)
    scorer = open_scorer(config, "joint", statistics, model, runtime)
    assert scorer is not None
    reader = open_split(config, "test", statistics, runtime, stage="joint")
    rows = score_rows_by(scorer, reader, runtime).rows
    return dict(zip(rows.row_ids.tolist(), rows.probabilities, strict=True)), scorer.account()


@pytest.fixture(scope="module")
def outcomes(directory: Path) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks: what each of them saw. Every job counts combinations anew."""
    found = {}
    for num_ranks in (1, 2, 3):
        (directory / "prepared" / SKETCH_FILE).unlink(missing_ok=True)
        alone = num_ranks == 1
        found[num_ranks] = (
            [score_on_ranks(directory)] if alone else run_ranks(num_ranks, score_on_ranks, directory)
        )
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_scores_and_passes_are_the_same_on_any_ranks(strategy, num_ranks, outcomes):
    expected, account = outcomes[1][0][strategy]
    assert sorted(expected) == list(range(300))
    assert np.ptp(list(expected.values())) > 0.01
    scores: dict[int, float] = {}
    for seen in outcomes[num_ranks]:
        scores |= seen[strategy][0]
        assert seen[strategy][1] == outcomes[num_ranks][0][strategy][1]
    assert sorted(scores) == list(range(300))
    np.testing.assert_allclose(
        [scores[row] for row in sorted(scores)],
        [expected[row] for row in sorted(expected)],
        atol=1e-6,
        rtol=0,
    )
    for key in account.keys() - {"time_multiple"}:
        assert outcomes[num_ranks][0][strategy][1][key] == pytest.approx(account[key], abs=1e-6), key


def test_evaluation_names_plain_scoring(directory):
    evaluation = read_evaluation(directory / "run" / "scratch")
    assert [evaluation["splits"][split]["inference"] for split in ("valid", "test")] == [PLAIN, PLAIN]


@pytest.mark.parametrize(
    ("strategy", "fewest", "most"),
    [("symmetric", 5.0, 5.0), ("feature_paths", 1.1, 4.0), ("uncertainty", 1.1, 2.8)],
)
def test_evaluation_names_the_strategy_and_its_cost(strategy, fewest, most, directory):
    assert run("evaluate", directory, "--stage", "joint", *chosen(strategy)) == 0
    splits = read_evaluation(directory / "run" / "joint")["splits"]
    for result in splits.values():
        assert result["inference"]["strategy"] == strategy
        assert result["inference"]["time_multiple"] > 0
        assert result["n"] == 300
    assert fewest <= splits["valid"]["inference"]["passes_per_row"] <= most


def test_combinations_are_counted_once_and_again_if_damaged(directory):
    config = tiny_config(directory, *TRAINED, *chosen("feature_paths"))
    path = directory / "prepared" / SKETCH_FILE
    path.unlink(missing_ok=True)
    written = []
    with start_runtime("cpu") as runtime:
        statistics = stages.prepare_data(config, runtime)
        model = build_sharded(config, "joint", statistics, runtime)
        for damage in (False, False, True):
            if damage:
                path.write_bytes(path.read_bytes()[:-50])
            open_scorer(config, "joint", statistics, model, runtime)
            written.append(path.stat())
    assert written[1].st_mtime_ns == written[0].st_mtime_ns
    assert written[2].st_mtime_ns > written[0].st_mtime_ns
    assert written[2].st_size == written[0].st_size


@pytest.mark.parametrize(
    ("strategy", "advice"),
    [
        ("symmetric", "evaluate a `joint` or `finetune` stage"),
        ("feature_paths", "set it to `out_of_vocabulary`"),
        ("uncertainty", "set it to `out_of_vocabulary`"),
    ],
)
def test_what_a_model_has_not_learnt_is_refused(strategy, advice, directory, capsys):
    assert run("evaluate", directory, "--stage", "scratch", *chosen(strategy)) == 2
    assert advice in capsys.readouterr().err


@pytest.mark.parametrize("strategy", ["feature_paths", "uncertainty"])
def test_any_model_can_drop_cells_to_out_of_vocabulary(strategy, directory, tmp_path):
    options = [f"inference.strategy={strategy}", "inference.dropped=out_of_vocabulary"]
    assert (
        run("predict", directory, "--stage", "scratch", *options, "--output", str(tmp_path / "scores")) == 0
    )
    assert list((tmp_path / "scores").iterdir())
