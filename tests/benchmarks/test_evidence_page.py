"""How runs are compared, and what the page says of them."""

import re
from pathlib import Path

import numpy as np
import pytest
from small_grid import FOLLOWED, METHODS, OTHER, grid_values, plan_of, record, sequence_record

from benchmarks.evidence.comparing import holm, paired_p_value, ranks
from benchmarks.evidence.contest import matches, verdict
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


AUCS = {
    "scratch": [0.700, 0.704, 0.702],
    "uniform": [0.711, 0.714, 0.712],
    "fm": [0.690, 0.689, 0.688],
    "other": [0.705, 0.708, 0.707],
}


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


GROUPED = {
    "groups": {"rest": "Others", "family": "Ours"},
    "contest": {"ours": ["family"], "baselines": ["rest"]},
    "methods": {
        "uniform": {**METHODS["uniform"], "group": "family"},
        "fm": {"title": "FM", "group": "rest", "stages": ["scratch"], "overrides": {"model.dim": 4}},
        "scratch": {**METHODS["scratch"], "group": "rest"},
        "other": {**OTHER, "group": "family"},
    },
}


@pytest.fixture
def grouped(tmp_path: Path) -> Plan:
    data_sets = grid_values(tmp_path)["data_sets"]
    data_sets["ads"]["peers"] = {
        "FM": {"source": "a library", "auc": 0.705, "tail_items": 0.6},
        "DIN": {"source": "a library", "auc": 0.709},
    }
    return plan_of(tmp_path, **GROUPED, data_sets=data_sets)


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ", maxsplit=1)[0]


def test_rows_stand_in_blocks_of_their_groups(tmp_path, grouped):
    table = section(page(grouped, finished(grouped), tmp_path), "AUC on test")
    firsts = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    in_blocks = ["| *Others*", "| FM", "| From scratch", "| *Ours*", "| Uniform", "| Other slices"]
    assert firsts[:8] == ["| method", "| ---", *in_blocks]


def test_the_best_of_ours_meets_the_best_baseline_on_valid(tmp_path, grouped):
    text = section(page(grouped, finished(grouped), tmp_path), "The best against the best")
    assert (
        "Of 2 data sets ours is higher on 2 (ads, shop), with p < 0.05 on 2 (ads, shop); it is lower" in text
    )
    met = "| Uniform | 0.7123 ± 0.0015 | From scratch | 0.7020 ± 0.0020 | +0.0103 ▲▲ |"
    assert f"| ads {met}" in text
    assert f"| shop {met}" in text
    # Scratch is 0.05 lower on cold users: the gain there is larger; tail items have one class only.
    assert "| ads | +0.0103 | +5.12 % | **+0.0603** ▲ | - | n/a |" in text


def test_a_contest_is_decided_on_valid_alone(tmp_path, grouped):
    done = finished(grouped)
    for one in done.values():
        if one.method == "other":
            one.splits["valid"]["auc"] += 0.1
    found = matches(Summary(grouped, done, tmp_path), grouped.grid.contest)
    assert [(match.ours, match.baseline) for match in found] == [("other", "scratch")] * 2
    assert [match.test.mean for match in found] == pytest.approx([0.005 - 1 / 3000] * 2)


def test_p_values_of_a_contest_are_corrected_for_the_data_sets(tmp_path, grouped):
    for match in matches(Summary(grouped, finished(grouped), tmp_path), grouped.grid.contest):
        assert match.test.adjusted == pytest.approx(2 * match.test.p_value)


def test_a_loss_gains_nothing_on_slices(tmp_path, grouped):
    worse = {**AUCS, "uniform": [0.1] * 3, "other": [0.69, 0.69, 0.69]}
    found = matches(Summary(grouped, finished(grouped, worse), tmp_path), grouped.grid.contest)
    assert [match.gains_most_on for match in found] == [[], []]
    assert "lower with p < 0.05 on 2 (ads, shop)" in verdict(found)


def test_strategies_are_held_against_the_plain_pass_of_the_same_models(tmp_path, grouped):
    done = finished(grouped)
    for one in done.values():
        is_strategy = one.method == "other"
        one.splits["test"]["inference"] = {"passes_per_row": 2.5, "time_multiple": 2.0} if is_strategy else {}
    text = section(page(grouped, done, tmp_path), "Test-time strategies")
    plain_and_not = "| Other slices | From scratch | 0.7020 ± 0.0020 | 0.7067 ± 0.0015 | +0.0047 ▲▲ |"
    (line, _) = [line for line in text.splitlines() if line.startswith(plain_and_not)]
    assert line.endswith("| 2.50 | 2.00 |")


def test_copied_figures_stand_apart_and_beside_what_valid_chooses(tmp_path, grouped):
    text = page(grouped, finished(grouped), tmp_path)
    table = section(text, "AUC on test").split("| copied, not measured here | ads |")[1]
    assert "| FM | 0.7050 |\n| DIN | **0.7090** |\n| ours, chosen on valid | 0.7123 |" in table
    assert "are those of a library." in section(text, "AUC on test").replace("\n", " ")
    assert "| copied, not measured here |" not in section(
        text, "LogLoss on test, temperature fitted on valid"
    )


def test_choices_are_ranked_by_themselves(tmp_path):
    methods = {name: {**one, "group": "all"} for name, one in METHODS.items()}
    fm = {
        "title": "FM",
        "group": "all",
        "stages": ["scratch"],
        "overrides": {"model.dim": 4},
        "only": ["ads"],
    }
    plan = plan_of(
        tmp_path,
        groups={"all": "All"},
        methods={**methods, "fm": fm},
        choices={"Kind": ["fm", "scratch", "uniform"], "Alone": ["scratch"]},
    )
    text = section(page(plan, finished(plan), tmp_path), "What validation would choose")
    overall, kind = text.split("| rank by AUC on valid | mean | ads | shop |")[1].split(
        "| Kind: rank on valid |"
    )
    assert "| Uniform | **1.00** | 1 | 1 |\n| From scratch | 2.00 | 2 | 2 |" in overall
    assert "FM" not in overall + kind  # it runs on one of the data sets only
    assert "Alone" not in kind  # the first of one says nothing


def test_failures_are_told(tmp_path, plan):
    unlucky = plan.first_run("shop")
    text = page(plan, {}, tmp_path, {unlucky.id: record(unlucky, status="failed")})
    assert "| shop / scratch / light / seed 0 | exit code 2: error: no luck |" in text


def test_ranks_are_over_data_sets_that_everybody_has_run_on(tmp_path, plan):
    done = finished(plan)
    assert Summary(plan, done, tmp_path).ranking(plan.grid.methods).means == {"uniform": 1.0, "scratch": 2.0}
    done = {run: one for run, one in done.items() if (one.data_set, one.method) != ("shop", "uniform")}
    assert list(Summary(plan, done, tmp_path).ranking(plan.grid.methods).by_data_set) == ["ads"]


def test_ranks_are_over_the_seeds_that_all_have(tmp_path, plan):
    late = {**AUCS, "scratch": [0.700, 0.704, 0.900]}
    done = finished(plan, late)
    assert Summary(plan, done, tmp_path).best_on_valid("ads", plan.grid.methods) == "scratch"
    done = {run: one for run, one in done.items() if (one.method, one.seed) != ("uniform", 2)}
    assert Summary(plan, done, tmp_path).best_on_valid("ads", plan.grid.methods) == "uniform"


def test_comparisons_are_paired_by_seed(tmp_path, plan):
    done = {run: one for run, one in finished(plan).items() if (one.method, one.seed) != ("scratch", 1)}
    found = Summary(plan, done, tmp_path).comparisons("ads", TEST_AUC)["uniform"]
    assert found.differences == pytest.approx((0.011, 0.010))


def of_ways(aucs: dict[str, float]) -> dict[str, dict]:
    return {
        way: {
            "auc": auc,
            "log_loss": 0.5,
            "gauc": None if way == "retrain" else 0.7,
            "seconds": 10 * auc,
            "rows": 12_000,
            "auc_by_period": {"4": auc - 0.01, "5": None if way == "retrain" else auc + 0.01},
        }
        for way, auc in aucs.items()
    }


def followed(plan: Plan, data_set: str) -> dict[str, Record]:
    """Records of a followed log: retraining gains .01 in the mean, FeSAIL chance."""
    gains = {"finetune": (0.0, 0.0, 0.0), "retrain": (0.011, 0.010, 0.009), "fesail": (0.02, -0.02, 0.003)}
    runs = [run for run in plan.sequences if run.data_set == data_set]
    return {
        run.id: sequence_record(
            run, of_ways({way: 0.8 + 0.001 * run.seed + gain[run.seed] for way, gain in gains.items()})
        )
        for run in runs
    }


def test_ways_of_following_a_log_stand_against_one_of_them(tmp_path):
    plan = plan_of(tmp_path, incremental={**FOLLOWED, "seeds": 3})
    text = section(page(plan, finished(plan) | followed(plan, "ads"), tmp_path), "Following a log")
    assert "those of AUC from “Fine-tuned”" in text.replace("\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert (
        lines[2]
        == "| Fine-tuned | 0.8010 ± 0.0010 | - | - | - | 0.5000 ± 0.0000 | 0.7000 ± 0.0000 | 12,000 | 8.0 |"
    )
    # t = .01 / (.001 / sqrt(3)) of 2 degrees of freedom; twice that is below .05, too.
    assert lines[3].startswith("| Retrained | **0.8110 ± 0.0000** | +0.0100 ▲▲ | 0.003 | 0.007 | 0.5000")
    assert lines[3].endswith("| - | 12,000 | 8.1 |")
    assert "| FeSAIL | 0.8020 ± 0.0197 | +0.0010 | 0.939 | 0.939 |" in text
    assert "| ads: AUC on period | 4 | 5 |" in text
    assert "| Fine-tuned | 0.7910 | 0.8110 |\n| Retrained | 0.8010 | n/a |" in text
    assert "shop" not in text


def test_the_part_of_a_followed_log_that_there_is_is_told_as_such(tmp_path):
    plan = plan_of(tmp_path, incremental={**FOLLOWED, "baseline": "retrain", "seeds": 3})
    done = {run: one for run, one in followed(plan, "shop").items() if one.seed == 0}
    text = section(page(plan, done, tmp_path), "Following a log")
    assert "| Fine-tuned | 0.8000 (1 of 3 seeds) | -0.0110 | n/a | n/a |" in text
    assert "| FeSAIL | **0.8200** (1 of 3 seeds) | +0.0090 | n/a | n/a |" in text


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
