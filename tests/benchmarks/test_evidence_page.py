"""How runs are compared, and what the page says of them."""

import re
from pathlib import Path

import numpy as np
import pytest
from small_grid import plan_of, record

from benchmarks.evidence.comparing import holm, paired_p_value, ranks
from benchmarks.evidence.page import to_html, to_markdown
from benchmarks.evidence.plan import Plan
from benchmarks.evidence.records import Record
from benchmarks.evidence.sections import sections_of
from benchmarks.evidence.summary import TEST_AUC, Summary
from benchmarks.evidence.tables import Cell, Table


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of(tmp_path)


def test_the_p_value_is_that_of_students_t():
    # t = 2.776445 is the two-sided 5 % point of 4 degrees of freedom.
    noise = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    scale = np.std(noise, ddof=1) / np.sqrt(5)
    assert paired_p_value(list(noise + 2.776445 * scale)) == pytest.approx(0.05, abs=1e-6)
    assert paired_p_value(list(noise - 2.776445 * scale)) == pytest.approx(0.05, abs=1e-6)
    assert paired_p_value(list(noise)) == pytest.approx(1.0)


def test_p_values_of_too_few_or_equal_differences():
    assert paired_p_value([0.1]) is None
    assert paired_p_value([0.5, 0.5]) == 0.0
    assert paired_p_value([0.0, 0.0]) == 1.0


def test_holm_multiplies_by_what_is_left_and_never_falls():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert found == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9})


def test_equal_values_share_their_ranks():
    assert ranks({"a": 0.5, "b": 0.7, "c": 0.5, "d": 0.1}) == {"b": 1, "a": 2.5, "c": 2.5, "d": 4}


AUCS = {"scratch": [0.700, 0.704, 0.702], "uniform": [0.711, 0.714, 0.712]}


def finished(plan: Plan, aucs=AUCS) -> dict[str, Record]:
    """Records of everything, `strong` being best on valid."""
    done = {}
    for run in plan.runs:
        auc = aucs[run.method][run.seed] if run.option == "strong" else 0.99
        rows = {"n": 20, "positives": 8, "auc": auc - 0.05 if run.method == "scratch" else auc}
        done[run.id] = record(
            run,
            valid=auc if run.option == "strong" else 0.1,
            test=auc,
            log_loss_scaled=1 - auc,
            slices={"cold_users": rows, "tail_items": {**rows, "auc": None}},
        )
    return done


def page(plan: Plan, done, directory: Path, failed=None) -> str:
    summary = Summary(plan, done, directory)
    return to_markdown("How.", list(sections_of(summary, failed or {}, directory)))


def test_the_table_tells_means_the_best_and_what_is_significant(tmp_path, plan):
    text = page(plan, finished(plan), tmp_path)
    assert "| method | ads | shop |" in text
    assert "| From scratch | 0.7020 ± 0.0020 | 0.7020 ± 0.0020 |" in text
    assert "| Uniform | **0.7123 ± 0.0015** ▲▲ | **0.7123 ± 0.0015** ▲▲ |" in text


def test_options_that_lost_on_valid_do_not_count(tmp_path, plan):
    assert "0.99" not in page(plan, finished(plan), tmp_path)


def test_low_log_loss_is_best_and_a_metric_that_nobody_has_is_left_out(tmp_path, plan):
    text = page(plan, finished(plan), tmp_path)
    assert "| Uniform | **0.2877 ± 0.0015** ▼▼ |" in text
    assert "GAUC" not in text


def test_gains_on_slices_stand_beside_the_gain_overall(tmp_path, plan):
    text = page(plan, finished(plan), tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("| Uniform | +"))
    assert re.match(
        r"\| Uniform \| \+0\.0103 ▲▲ \| 0\.00\d \| 0\.00\d \| n/a \| \+5\.1\d % \| \+0\.0603", line
    )
    assert line.endswith("| - |")  # tail items have one class only
    assert "| rows (clicks) | 20 (8) | 20 (8) |" in text


def test_what_is_not_significant_has_no_mark(tmp_path, plan):
    noisy = {**AUCS, "uniform": [0.690, 0.730, 0.700]}
    text = page(plan, finished(plan, noisy), tmp_path)
    assert "▲" not in text.split("## ")[1].split("| method |")[1]


def test_passes_are_told_where_scoring_takes_more_than_one(tmp_path, plan):
    done = finished(plan)
    assert "network passes" not in page(plan, done, tmp_path)
    for one in done.values():
        one.splits["test"]["inference"] = {"passes_per_row": 2.5 if one.method == "uniform" else 1.0}
    text = page(plan, done, tmp_path).split("| network passes")[1]
    assert "| From scratch | 1.00 | 1.00 |" in text
    assert "| Uniform | 2.50 | 2.50 |" in text


def test_a_part_of_the_grid_is_told_as_such(tmp_path, plan):
    done = {run: one for run, one in finished(plan).items() if one.seed == 0 and one.data_set == "ads"}
    text = page(plan, done, tmp_path)
    assert "| Uniform | **0.7110** (1 of 3 seeds) |" in text
    assert "shop" not in text


def test_failures_are_told(tmp_path, plan):
    unlucky = plan.first_run("shop")
    text = page(plan, {}, tmp_path, {unlucky.id: record(unlucky, status="failed")})
    assert "| shop / scratch / light / seed 0 | exit code 2: error: no luck |" in text


def test_ranks_are_over_data_sets_that_everybody_has_run_on(tmp_path, plan):
    done = finished(plan)
    assert Summary(plan, done, tmp_path).mean_ranks == {"uniform": 1.0, "scratch": 2.0}
    done = {run: one for run, one in done.items() if (one.data_set, one.method) != ("shop", "uniform")}
    assert list(Summary(plan, done, tmp_path).ranks) == ["ads"]


def test_comparisons_are_paired_by_seed(tmp_path, plan):
    done = {run: one for run, one in finished(plan).items() if (one.method, one.seed) != ("scratch", 1)}
    found = Summary(plan, done, tmp_path).comparisons("ads", TEST_AUC)["uniform"]
    assert found.differences == pytest.approx((0.011, 0.010))


def test_cells_are_escaped_for_both_formats():
    table = Table(["a"], [[Cell("x|<b>", True, "n")]])
    assert table.markdown()[-1] == "| **x\\|<b>** n |"
    assert '<td class="best">x|&lt;b&gt; <span class="note">n</span></td>' in table.html()


def test_the_page_for_browsers_holds_its_plots(tmp_path, plan):
    summary = Summary(plan, finished(plan), tmp_path)
    text = to_html("How & why.", list(sections_of(summary, {}, tmp_path)))
    assert "How &amp; why." in text
    assert text.count("data:image/svg+xml;base64,") == 1
    assert "http" not in text
