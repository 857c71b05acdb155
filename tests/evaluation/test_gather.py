import numpy as np
import plain_metrics
import pytest
import torch
import torch.distributed as dist
from multirank import run_ranks

from hetegen_rec.config.run import EvaluationConfig
from hetegen_rec.evaluation import metrics
from hetegen_rec.evaluation.errors import EvaluationError
from hetegen_rec.evaluation.gather import evaluate_predictions
from hetegen_rec.evaluation.predictions import Predictions

CONFIG = EvaluationConfig(calibration_bins=7)
HEAD = 20
SCENARIOS = ("plain", "ties", "constant", "one_class", "fewer_rows_than_ranks", "no_context")


def rows_of(scenario):
    rng = np.random.default_rng(SCENARIOS.index(scenario))
    size = 2 if scenario == "fewer_rows_than_ranks" else 3000
    labels = (rng.random(size) < 0.2).astype(np.float64)
    probabilities = 1 / (1 + np.exp(1.3 - labels - rng.normal(size=size)))
    if scenario == "ties":
        probabilities = probabilities.round(1)
    if scenario == "constant":
        probabilities[:] = 0.25
    if scenario == "one_class":
        labels[:] = 0
    context = {
        "user_key": rng.integers(-40, 40, size),
        "user_rows": rng.integers(0, 9, size),
        "item_rows": rng.integers(-1, 60, size),
    }
    return probabilities, labels, {} if scenario == "no_context" else context


def predictions_of(scenario, rank, world_size):
    """This rank's interleaved share, in two batches, with one row of padding."""
    probabilities, labels, context = rows_of(scenario)
    predictions = Predictions()
    mine = np.arange(rank, len(labels), world_size)
    for share in np.array_split(mine, 2) if len(mine) else []:
        padded = np.append(share, share[-1:])
        ids = np.append(share, np.full(len(share[-1:]), -1))
        predictions.add(
            torch.from_numpy(probabilities[padded]),
            labels[padded],
            ids,
            {name: torch.from_numpy(column[padded]) for name, column in context.items()},
        )
    return predictions


def evaluate_all():
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results = {}
    with torch.inference_mode():
        for scenario in SCENARIOS:
            predictions = predictions_of(scenario, rank, world_size)
            results[scenario] = evaluate_predictions(predictions, dist.group.WORLD, CONFIG, HEAD, 1.7)
    diverged = Predictions()
    diverged.add([np.nan if rank == 1 else 0.5], [0.0], [rank], {})
    try:
        evaluate_predictions(diverged, dist.group.WORLD, CONFIG)
    except EvaluationError as error:
        results["error"] = str(error)
    dist.destroy_process_group()
    return results


def alone(scenario):
    return evaluate_predictions(predictions_of(scenario, 0, 1), None, CONFIG, HEAD, 1.7)


def assert_close(found, expected, path="result"):
    if isinstance(expected, dict):
        assert set(found) == set(expected), path
        for key in expected:
            assert_close(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for index, value in enumerate(expected):
            assert_close(found[index], value, f"{path}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12), path
    else:
        assert found == expected, path


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_one_process_gives_the_plain_metrics(scenario):
    probabilities, labels, context = rows_of(scenario)
    result = alone(scenario)
    assert result["n"] == len(labels)
    assert result["positives"] == labels.sum()
    bins = plain_metrics.calibration_bins(probabilities, labels, 7)
    expected = {
        "auc": metrics.auc(probabilities, labels),
        "log_loss": plain_metrics.log_loss(probabilities, labels),
        "normalized_entropy": plain_metrics.normalized_entropy(probabilities, labels),
        "calibration": plain_metrics.calibration(probabilities, labels),
        "temperature": plain_metrics.fit_temperature(probabilities, labels),
        "log_loss_scaled": plain_metrics.log_loss(metrics.scale_probabilities(probabilities, 1.7), labels),
        "calibration_bins": [one._asdict() for one in bins],
    }
    curve = plain_metrics.roc_curve(probabilities, labels)
    expected["roc"] = curve and curve._asdict()
    assert_close({name: result[name] for name in expected}, expected)
    if context:
        known = context["user_key"] != 0
        gauc = plain_metrics.gauc(probabilities[known], labels[known], context["user_key"][known])
        assert_close([result["gauc"], result["gauc_users"], result["gauc_rows"]], list(gauc))
    else:
        assert result["gauc"] is None
        assert result["slices"] == {}


def test_slices_are_metrics_of_their_rows():
    probabilities, labels, context = rows_of("plain")
    masks = {
        "cold_users": (context["user_key"] != 0) & (context["user_rows"] > 0) & (context["user_rows"] < 6),
        "unseen_items": context["item_rows"] == 0,
        "tail_items": (context["item_rows"] >= 0) & (context["item_rows"] < HEAD),
    }
    for name, mask in masks.items():
        found = alone("plain")["slices"][name]
        assert found["n"] == mask.sum()
        assert found["positives"] == labels[mask].sum()
        assert found["auc"] == pytest.approx(metrics.auc(probabilities[mask], labels[mask]), abs=1e-12)
        assert found["log_loss"] == pytest.approx(plain_metrics.log_loss(probabilities[mask], labels[mask]))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_ranks_gives_the_same_numbers_on_every_rank(world_size):
    for result in run_ranks(world_size, evaluate_all):
        for scenario in SCENARIOS:
            assert_close(result[scenario], alone(scenario))
        if world_size > 1:
            assert "rank 1" in result["error"]
            assert "diverge" in result["error"]


def test_equal_scores_and_balanced_ranges_have_one_owner():
    from hetegen_rec.evaluation.exchange import Ranks

    ranks = Ranks(None)
    ranks.size = 4
    ranks.gather = lambda value: [value] * 4
    scores = np.sort(np.random.default_rng(0).random(10_000).round(3))
    owners = ranks.owners_of_scores(scores)
    assert (np.diff(owners) >= 0).all()
    assert all(len(set(owners[scores == score])) == 1 for score in set(scores))
    assert np.bincount(owners, minlength=4).max() < 0.3 * len(scores)


def test_rows_of_padding_count_for_nothing():
    predictions = Predictions()
    predictions.add([0.2, 0.9, 0.5], [0, 1, 1], [0, 1, -1], {"user_key": [1, 1, 1]})
    assert predictions.rows.row_ids.tolist() == [0, 1]
    assert predictions.rows.context["user_key"].tolist() == [1, 1]
    predictions.add([0.4], [1], [2], {"user_key": [2]})
    assert predictions.rows.labels.tolist() == [0, 1, 1]


def test_no_rows_and_strange_labels_are_errors():
    with pytest.raises(EvaluationError, match="no row"):
        evaluate_predictions(Predictions(), None, CONFIG)
    predictions = Predictions()
    predictions.add([0.2], [2.0], [7], {})
    with pytest.raises(EvaluationError, match=r"row 7: 2\.0"):
        evaluate_predictions(predictions, None, CONFIG)
