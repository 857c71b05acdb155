import base64
import html
import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import fake_run
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hetegen_rec.evaluation.errors import EvaluationError
from hetegen_rec.evaluation.plots import _spread
from hetegen_rec.evaluation.report import write_report
from hetegen_rec.evaluation.results import compare_with_scratch, read_evaluations


def images_of(page):
    return dict(re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)">', page))


def report_of(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text()


def test_a_whole_run_becomes_one_page_that_needs_nothing_else(tmp_path):
    fake_run.write_run(tmp_path)
    page = report_of(tmp_path)
    assert set(images_of(page)) == {
        "Slices",
        "ROC curve",
        "Calibration",
        "Difficulty of every field",
        "Weight of every field",
        "Reconstruction loss over time",
        "Reconstruction loss at the end",
        "Share of the gradient",
        "AUC on valid",
        "Loss of the click",
        "Generative loss",
    }
    for image in images_of(page).values():
        assert ElementTree.fromstring(base64.b64decode(image)).tag.endswith("svg")
    outside_images = re.sub(r"base64,[^\"]*", "", page)
    assert not re.search(r"https?://|<script|<link|url\(", outside_images)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]


def test_generative_stages_show_how_held_out_rows_are_reconstructed(tmp_path):
    fake_run.write_run(tmp_path, stages=("pretrain", "joint"))
    page = report_of(tmp_path)
    assert page.count("Reconstruction of valid") == 2
    assert "<td>user_id *</td><td>800</td><td>4.216</td><td>6.800</td>" in page
    assert "<td>genres</td>" in page  # the whole vocabulary: no mark
    assert "<th>t 0.75-1.00</th>" in page
    assert "has the most: 18 %" in page


def test_the_headline_says_how_fine_tuning_compares_with_scratch(tmp_path):
    fake_run.write_run(tmp_path, stages=("finetune", "scratch"))
    page = report_of(tmp_path)
    evaluations = read_evaluations(tmp_path)
    found = compare_with_scratch(tmp_path, evaluations, "test")["finetune"]
    assert f"AUC of {evaluations['finetune']['splits']['test']['auc']:.4f} on test" in page
    assert f"{found.auc_difference:.4f} above the same network trained from scratch" in page
    assert f"{found.interval.low:+.4f} to {found.interval.high:+.4f}" in page


def test_the_headline_is_about_the_stage_that_valid_prefers_whatever_test_says(tmp_path):
    fake_run.write_run(tmp_path, stages=("finetune", "joint"))
    for stage, (valid, test) in {"finetune": (0.71, 0.69), "joint": (0.70, 0.72)}.items():
        path = tmp_path / stage / "evaluation.json"
        evaluation = json.loads(path.read_text())
        for split, auc in (("valid", valid), ("test", test)):
            evaluation["splits"][split]["auc"] = auc
        path.write_text(json.dumps(evaluation))
    assert "AUC of 0.6900 on test" in report_of(tmp_path)


@pytest.mark.parametrize(
    ("form", "guidance", "use", "rises", "one"),
    [
        ("difficulty", "residual", "weight in the generative loss and its gain", True, "an even split"),
        (
            "difficulty",
            "none",
            "From it comes the field's weight in the generative loss.",
            True,
            "an even split",
        ),
        ("uniform", "residual", "does not come from it", True, "an even split"),
        ("literal", "residual", "follows twice its cross-entropy", False, "the weight at the start"),
        ("uncertainty", "residual", "From it comes the field's weight", False, "the weight at the start"),
    ],
)
def test_words_about_fields_hold_for_the_form_of_balancing(tmp_path, form, guidance, use, rises, one):
    fake_run.write_run(tmp_path, stages=("pretrain",))
    path = tmp_path / "pretrain" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["balance"]["form"] = form
    config["model"]["denoiser"]["attention"]["guidance"] = guidance
    path.write_text(yaml.safe_dump(config))
    page = html.unescape(report_of(tmp_path))
    assert use in page
    assert ("rises while its reconstruction is worse than guessing" in page) == rises
    assert f"1 is {one}." in page


def test_a_worse_result_is_called_worse(tmp_path):
    fake_run.write_run(tmp_path, stages=("finetune", "scratch"))
    for stage, value in (("finetune", 0.71), ("scratch", 0.72)):
        path = tmp_path / stage / "evaluation.json"
        content = json.loads(path.read_text())
        content["splits"]["test"]["auc"] = value
        path.write_text(json.dumps(content))
    assert "0.0100 below the same network" in report_of(tmp_path)


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        ("finetune", "the network (symmetric, 3.00 passes) reaches an AUC"),
        ("scratch", "trained from scratch (symmetric, 3.00 passes) ("),
    ],
)
def test_the_headline_names_a_strategy(tmp_path, stage, told):
    fake_run.write_run(tmp_path, stages=("finetune", "scratch"))
    path = tmp_path / stage / "evaluation.json"
    content = json.loads(path.read_text())
    content["splits"]["test"]["inference"] = {"strategy": "symmetric", "passes_per_row": 3.0}
    path.write_text(json.dumps(content))
    assert told in report_of(tmp_path)


def test_without_predictions_the_report_says_that_the_interval_is_missing(tmp_path):
    fake_run.write_run(tmp_path, stages=("finetune", "scratch"))
    (tmp_path / "scratch" / "predictions" / "test" / "part-0.parquet").unlink()
    assert "no confidence interval" in report_of(tmp_path)


@pytest.mark.parametrize(
    ("stages", "present", "absent"),
    [
        (("pretrain",), "Difficulty of every field", "ROC curve"),
        (("scratch",), "ROC curve", "Difficulty of every field"),
        (("joint",), "in the joint stage", "Against from scratch"),
    ],
)
def test_stages_that_were_not_run_are_left_out(tmp_path, stages, present, absent):
    fake_run.write_run(tmp_path, stages=stages)
    page = report_of(tmp_path)
    assert present in page
    assert absent not in page


@pytest.mark.parametrize("missing", ["log.jsonl", "config.yaml", "evaluation.json"])
def test_a_missing_file_leaves_out_its_part_only(tmp_path, missing):
    fake_run.write_run(tmp_path, stages=("scratch",))
    (tmp_path / "scratch" / missing).unlink()
    page = report_of(tmp_path)
    assert ("AUC on valid" in page) == (missing != "log.jsonl")
    assert ("Resolved configuration" in page) == (missing != "config.yaml")
    assert ("ROC curve" in page) == (missing != "evaluation.json")


def test_values_that_are_not_defined_do_not_stop_the_report(tmp_path):
    fake_run.write_run(tmp_path, stages=("finetune", "scratch"))
    path = tmp_path / "finetune" / "evaluation.json"
    content = json.loads(path.read_text())
    for result in content["splits"].values():
        result.update(dict.fromkeys(("auc", "gauc", "roc", "calibration", "normalized_entropy")))
        for part in result["slices"].values():
            part["auc"] = None
    path.write_text(json.dumps(content))
    assert "n/a" in report_of(tmp_path)


def test_many_fields_each_keep_their_bar(tmp_path):
    fake_run.write_run(tmp_path, stages=("pretrain",), num_fields=39)
    page = report_of(tmp_path)
    assert "Grey: the 29 fields in between" in page
    figure = base64.b64decode(images_of(page)["Reconstruction loss at the end"]).decode()
    assert figure.count("nats -->") == 39


def test_a_log_line_that_was_cut_off_is_left_out(tmp_path, caplog):
    fake_run.write_run(tmp_path, stages=("scratch",))
    with (tmp_path / "scratch" / "log.jsonl").open("a") as log:
        log.write('{"event": "train", "st')
    report_of(tmp_path)
    assert "is not JSON" in caplog.text


def test_names_are_escaped(tmp_path):
    fake_run.write_run(tmp_path, stages=("scratch",))
    path = tmp_path / "scratch" / "config.yaml"
    path.write_text(yaml.safe_dump(fake_run.config() | {"name": "<script>alert(1)</script>"}))
    page = report_of(tmp_path)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_run_without_a_trace_is_an_error_and_leaves_no_report(tmp_path):
    (tmp_path / "scratch").mkdir()
    with pytest.raises(EvaluationError, match="train one first"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_evaluation_keeps_the_old_report(tmp_path):
    fake_run.write_run(tmp_path, stages=("scratch",))
    before = report_of(tmp_path)
    (tmp_path / "scratch" / "evaluation.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"evaluation\.json"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == before


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_labels_are_moved_apart_in_order_and_stay_inside(places):
    spread = _spread(sorted(places), 0.06)
    assert all(b - a > 0.06 - 1e-9 for a, b in pairwise(spread))
    assert spread[-1] <= 1 + 1e-9
    assert spread[0] >= -1e-9
