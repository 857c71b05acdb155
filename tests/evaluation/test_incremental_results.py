"""The results of models that followed a log: whose they are, their means, table and page."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from hetegen_rec.config.incremental import Way
from hetegen_rec.evaluation.incremental import SequenceResults, UpdateResult, results_table, write_page

DONE = {"steps": 5, "seconds": 2.0, "skipped_steps": 0, "skipped_rows": 0}


def update(way: Way | None, period: int, auc: float | None, log_loss: float = 0.5) -> UpdateResult:
    tested = {"n": 1200, "positives": 300, "auc": auc, "log_loss": log_loss, "roc": "left out"}
    return UpdateResult.of(way, period, 100, DONE, tested)


def results(*updates: UpdateResult) -> SequenceResults:
    periods = [{"number": number} for number in (1, 2, 3, 4)]
    return SequenceResults("ads <1>", "scratch", 3, ("finetune", "retrain"), periods, list(updates))


@pytest.fixture
def finished() -> SequenceResults:
    return results(
        update(None, 1, 0.6),
        update("finetune", 2, 0.7),
        update("retrain", 2, 0.8),
        update("finetune", 3, 0.72),
        update("retrain", 3, 0.9),
    )


def shown(found: SequenceResults) -> str:
    console = Console(width=120, record=True)
    console.print(results_table(found))
    return console.export_text()


def test_the_first_model_stands_for_every_way(finished: SequenceResults) -> None:
    assert finished.tested_periods == [2, 3, 4]
    assert finished.result("finetune", 2) is finished.result("retrain", 2) is finished.updates[0]
    assert finished.result("retrain", 4) is finished.updates[-1]


def test_means_leave_the_first_model_out(finished: SequenceResults) -> None:
    means = finished.means()
    assert means["finetune"]["auc"] == pytest.approx(0.71)
    assert means["retrain"]["auc"] == pytest.approx(0.85)
    assert means["retrain"]["seconds"] == 2.0


def test_means_are_over_periods_that_all_ways_have_come_to(finished: SequenceResults) -> None:
    finished.updates.pop()
    assert finished.means()["finetune"]["auc"] == pytest.approx(0.7)


def test_a_metric_that_one_period_lacks_has_no_mean() -> None:
    found = results(
        update("finetune", 2, None),
        update("retrain", 2, 0.8),
        update("finetune", 3, 0.7),
        update("retrain", 3, 0.8),
    )
    assert found.means()["finetune"] == {"auc": None, "log_loss": 0.5, "gauc": None, "seconds": 2.0}
    assert "n/a" in shown(found)


def test_a_table_with_a_line_a_period_and_the_means(finished: SequenceResults) -> None:
    lines = shown(finished).splitlines()
    assert any("2 (first model)" in line and line.count("0.6000") == 2 for line in lines)
    assert any("mean" in line and "0.7100" in line and "0.8500" in line for line in lines)


def test_nothing_to_show_yet_is_no_error() -> None:
    assert "mean" in shown(results(update(None, 1, 0.6)))


def test_file_and_page_hold_what_there_is(finished: SequenceResults, tmp_path: Path) -> None:
    content = json.loads(finished.write(tmp_path).read_text())
    assert [one["way"] for one in content["updates"]] == [None, "finetune", "retrain", "finetune", "retrain"]
    assert content["updates"][0]["metrics"] | {"auc": 0.6, "n": 1200} == content["updates"][0]["metrics"]
    assert content["means"]["retrain"]["auc"] == pytest.approx(0.85)
    page = write_page(finished, tmp_path).read_text()
    assert "ads &lt;1&gt;" in page
    assert "0.8500" in page
    assert page.count("data:image/svg+xml") == 2
