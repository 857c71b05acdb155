import json
import re

import fake_run
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from hetegen_rec.config.run import EvaluationConfig
from hetegen_rec.evaluation import metrics, results, significance
from hetegen_rec.evaluation.errors import EvaluationError
from hetegen_rec.evaluation.gather import evaluate_predictions
from hetegen_rec.evaluation.predictions import Predictions
from hetegen_rec.evaluation.tables import results_tables

ROWS = 1500


def scored(noise, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=ROWS)
    labels = (rng.random(ROWS) < 1 / (1 + np.exp(1 - 2 * truth))).astype(float)
    logits = 2 * truth - 1 + noise * np.random.default_rng(seed + 1).normal(size=ROWS)
    return 1 / (1 + np.exp(-logits)), labels, rng.integers(0, 120, ROWS)


def write_stage(run_dir, stage, noise, with_predictions=True, splits=("valid", "test")):
    probabilities, labels, users = scored(noise)
    predictions = Predictions()
    context = {"user_key": users, "user_rows": users % 7, "item_rows": users % 5}
    predictions.add(probabilities, labels, np.arange(ROWS), context)
    result = evaluate_predictions(predictions, None, EvaluationConfig(), 3)
    directory = run_dir / stage
    results.write_evaluation(
        directory,
        {
            "run": "r",
            "stage": stage,
            "checkpoint": "step-9",
            "step": 9,
            "splits": dict.fromkeys(splits, result),
        },
    )
    if with_predictions:
        write_predictions(directory / "predictions" / "test", probabilities, labels, users)


def write_predictions(directory, probabilities, labels, users=None):
    directory.mkdir(parents=True)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    columns = {"row_id": np.arange(len(labels)), "probability": probabilities, "label": labels}
    if users is not None:
        columns["user_key"] = users
    for part, rows in enumerate(np.array_split(shuffled, 2)):
        pq.write_table(
            pa.table({name: column[rows] for name, column in columns.items()}),
            directory / f"part-{part}.parquet",
        )


def printed(run_dir):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_tables(run_dir))
    return console.export_text()


def test_evaluation_is_written_whole_and_read_back(tmp_path):
    write_stage(tmp_path, "scratch", 0.5)
    found = results.read_evaluation(tmp_path / "scratch")
    assert found["splits"]["test"]["n"] == ROWS
    assert [path.name for path in (tmp_path / "scratch").iterdir() if path.is_file()] == ["evaluation.json"]
    assert results.read_evaluation(tmp_path / "joint") is None


def test_a_failed_write_keeps_the_old_evaluation(tmp_path):
    write_stage(tmp_path, "scratch", 0.5, with_predictions=False)
    before = (tmp_path / "scratch" / "evaluation.json").read_text()
    bad = {
        "run": "r",
        "stage": "scratch",
        "checkpoint": "",
        "step": 1,
        "splits": {"test": {"auc": float("nan")}},
    }
    with pytest.raises(ValueError, match="JSON"):
        results.write_evaluation(tmp_path / "scratch", bad)
    assert (tmp_path / "scratch" / "evaluation.json").read_text() == before
    assert len(list((tmp_path / "scratch").iterdir())) == 1


@pytest.mark.parametrize("content", ["{", json.dumps({"run": "r"}), "[]"])
def test_a_damaged_evaluation_names_its_file(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"evaluation\.json.*evaluate the stage again"):
        results.read_evaluation(tmp_path)


def test_comparison_with_scratch_has_difference_improvement_and_interval(tmp_path):
    write_stage(tmp_path, "scratch", 2.0)
    write_stage(tmp_path, "finetune", 0.1)
    evaluations = results.read_evaluations(tmp_path)
    assert list(evaluations) == ["finetune", "scratch"]
    found = results.compare_with_scratch(tmp_path, evaluations, "test")["finetune"]
    ours, theirs = (evaluations[stage]["splits"]["test"]["auc"] for stage in ("finetune", "scratch"))
    assert found.auc_difference == pytest.approx(ours - theirs)
    assert found.relative_improvement == pytest.approx(metrics.relative_improvement(ours, theirs))
    assert found.interval.low < found.auc_difference < found.interval.high
    assert found.interval.excludes_zero


def test_without_predictions_there_is_no_interval(tmp_path):
    write_stage(tmp_path, "scratch", 2.0)
    write_stage(tmp_path, "joint", 0.1, with_predictions=False)
    found = results.compare_with_scratch(tmp_path, results.read_evaluations(tmp_path), "test")
    assert found["joint"].interval is None


@pytest.mark.parametrize("stage", ["scratch", "finetune"])
def test_predictions_that_were_not_evaluated_give_no_interval(tmp_path, caplog, stage):
    """`predict` of another checkpoint replaces them, and `evaluate` alone the evaluation."""
    for name in ("scratch", "finetune"):
        write_stage(tmp_path, name, 0.5, with_predictions=name != stage)
    _, labels, users = scored(0.5)
    write_predictions(tmp_path / stage / "predictions" / "test", scored(2.0)[0], labels, users)
    found = results.compare_with_scratch(tmp_path, results.read_evaluations(tmp_path), "test")["finetune"]
    assert (found.auc_difference, found.interval) == (0.0, None)
    assert f"Evaluate {stage} again" in caplog.text


def test_the_interval_of_equal_predictions_is_zero_and_of_seeds_repeats(tmp_path):
    probabilities, labels, users = scored(1.0)
    write_predictions(tmp_path / "a", probabilities, labels, users)
    write_predictions(tmp_path / "b", scored(0.2)[0], labels, users)
    one, other = (significance.read_predictions(tmp_path / name) for name in "ab")
    assert significance.auc_difference_interval(one, one) == (0.0, 0.0)
    first, again = (significance.auc_difference_interval(other, one, 50, seed=4) for _ in range(2))
    assert first == again
    assert first != significance.auc_difference_interval(other, one, 50, seed=5)


def test_users_are_resampled_as_a_whole(tmp_path):
    """Ten copies of every row under one user hold no more evidence than the row alone."""
    probabilities, labels, _ = scored(1.0)
    better = scored(0.6)[0]
    widths = {}
    for name, users in (("users", np.arange(ROWS).repeat(10) + 1), ("rows", None)):
        for stage, values in (("a", probabilities), ("b", better)):
            write_predictions(tmp_path / name / stage, values.repeat(10), labels.repeat(10), users)
        tables = [significance.read_predictions(tmp_path / name / stage) for stage in "ba"]
        interval = significance.auc_difference_interval(*tables)
        widths[name] = interval.high - interval.low
    assert widths["users"] > 2 * widths["rows"]


def test_rows_without_a_user_are_resampled_alone():
    nobody = np.zeros(3, np.int64)
    table = significance.PredictionTable(np.arange(3), np.ones(3), np.ones(3), nobody)
    assert len(set(table.units)) == 3


def test_predictions_of_other_rows_are_refused(tmp_path):
    probabilities, labels, _ = scored(1.0)
    write_predictions(tmp_path / "a", probabilities, labels)
    write_predictions(tmp_path / "b", probabilities[1:], labels[1:])
    with pytest.raises(EvaluationError, match="different rows"):
        significance.auc_difference_interval(
            *map(significance.read_predictions, (tmp_path / "a", tmp_path / "b"))
        )


def test_damaged_predictions_name_their_place(tmp_path):
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(EvaluationError, match="cannot be read"):
        significance.read_predictions(tmp_path)
    pq.write_table(pa.table({"row_id": [1]}), tmp_path / "x.parquet")
    with pytest.raises(EvaluationError, match="probability, label"):
        significance.read_predictions(tmp_path)
    pq.write_table(
        pa.table({"row_id": [4, 4], "probability": [0.5, 0.5], "label": [0, 1]}), tmp_path / "x.parquet"
    )
    with pytest.raises(EvaluationError, match="row 4 was predicted twice"):
        significance.read_predictions(tmp_path)


def test_tables_show_every_stage_and_na_where_nothing_is_defined(tmp_path):
    assert "Nothing scores clicks yet" in printed(tmp_path)
    write_stage(tmp_path, "scratch", 2.0)
    write_stage(tmp_path, "finetune", 0.1)
    content = json.loads((tmp_path / "finetune" / "evaluation.json").read_text())
    content["splits"]["test"]["gauc"] = None
    (tmp_path / "finetune" / "evaluation.json").write_text(json.dumps(content))
    text = printed(tmp_path)
    assert "Metrics on test" in text
    assert "n/a" in text
    assert "users with 1-5 training rows" in text
    assert "Against from-scratch on test" in text


def test_tables_show_a_pretraining_that_scored_no_clicks(tmp_path):
    fake_run.write_run(tmp_path, stages=("pretrain",))
    text = printed(tmp_path)
    assert "Reconstruction of valid, pretrain" in text
    assert re.search(r"user_id \* +│ +800 │ +4\.216 │ +6\.800 │ +6\.460 │ +0\.620 │ +0\.380 │", text)
    assert "Nothing scores clicks yet" in text
    assert "Metrics on" not in text


def test_tables_name_a_strategy_and_its_cost_but_not_plain_scoring(tmp_path):
    for stage, account in (
        ("finetune", {"strategy": "symmetric", "passes_per_row": 3.0}),
        ("scratch", {"strategy": "plain", "passes_per_row": 1.0}),
    ):
        write_stage(tmp_path, stage, 0.5)
        content = json.loads((tmp_path / stage / "evaluation.json").read_text())
        content["splits"]["test"]["inference"] = account
        (tmp_path / stage / "evaluation.json").write_text(json.dumps(content))
    text = printed(tmp_path)
    assert "finetune (symmetric, 3.00 passes)" in text
    assert f"{results.STAGE_TITLES['finetune']} (symmetric, 3.00 passes)" in text
    assert "Against from-scratch on test" in text
    assert "plain" not in text


def test_a_comparison_names_the_strategy_of_from_scratch(tmp_path):
    for stage in ("finetune", "scratch"):
        write_stage(tmp_path, stage, 0.5)
    path = tmp_path / "scratch" / "evaluation.json"
    content = json.loads(path.read_text())
    content["splits"]["test"]["inference"] = {"strategy": "uncertainty", "passes_per_row": 2.5}
    path.write_text(json.dumps(content))
    assert "Against from-scratch (uncertainty, 2.50 passes) on test" in printed(tmp_path)


def test_results_are_about_valid_if_there_is_no_test_split(tmp_path):
    write_stage(tmp_path, "scratch", 2.0, splits=("valid",))
    assert "Metrics on valid" in printed(tmp_path)


def test_a_run_without_user_and_item_has_no_empty_table_of_slices(tmp_path):
    metrics = {"n": 2, "positives": 1, "auc": 0.7, "log_loss": 0.5, "normalized_entropy": 0.9}
    metrics.update(gauc=None, gauc_users=None, calibration=1.0, slices={})
    results.write_evaluation(
        tmp_path / "finetune",
        {"run": "ads", "stage": "finetune", "checkpoint": "", "step": 1, "splits": {"valid": metrics}},
    )
    assert "Slices" not in printed(tmp_path)
