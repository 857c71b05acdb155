"""What the page says of the generative stages, from the files that runs leave."""

import json
from pathlib import Path

import pytest
import yaml
from small_grid import METHODS, plan_of, record

from benchmarks.evidence.diagnostics import diagnostic_sections
from benchmarks.evidence.page import to_markdown
from benchmarks.evidence.plan import Plan
from benchmarks.evidence.records import Record
from benchmarks.evidence.summary import Summary

FIELDS = ("hard", "noise", "easy", "easier")
RELATIVE = {"hard": 0.8, "noise": 1.0, "easy": 0.4, "easier": 0.2}
SHARES = {"hard": 0.3, "noise": 0.1, "easy": 0.2, "easier": 0.4}


def log_line(step: int, weight: float, probed: bool) -> str:
    fields = {
        name: {
            "loss": 1.0,
            "relative": RELATIVE[name],
            "difficulty": RELATIVE[name] * step,
            "weight": weight,
            **({"gradient_share": SHARES[name], "label_cosine": 0.25} if probed else {}),
        }
        for name in FIELDS
    }
    return json.dumps({"event": "train", "step": step, "fields": fields})


def reconstruction(top_1: float) -> dict:
    one = {"targets": 9, "among": "vocabulary", "chance": 2.0, "levels": []}
    found = {**one, "cross_entropy": 0.5, "baseline": 1.0, "relative": 0.25, "top_1": top_1, "top_10": 0.9}
    nothing = dict.fromkeys(("cross_entropy", "baseline", "relative", "top_1", "top_10"), None)
    return {"hard": found, "easy": {**one, **nothing}}


def leave_stage(
    directory: Path, form: str, top_1: float | None, probed: bool = True, objective: str = "diffusion"
) -> None:
    """What a pre-training leaves of its fields."""
    directory.mkdir(parents=True)
    lines = [log_line(step, 1.0 if form == "uniform" else step, probed) for step in (1, 2)]
    (directory / "log.jsonl").write_text("\n".join(lines))
    model = {"balance": {"form": form}, "objective": {"name": objective}}
    (directory / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    if top_1 is not None:
        about = {"run": "", "stage": "pretrain", "checkpoint": "", "step": 2, "splits": {}}
        about["reconstruction"] = {"valid": reconstruction(top_1)}
        (directory / "evaluation.json").write_text(json.dumps(about))


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    more = {**METHODS["uniform"], "title": "Hard up", "overrides": {"model.balance.form": "difficulty"}}
    return plan_of(tmp_path, methods={**METHODS, "difficulty": more})


def finished(plan: Plan) -> dict[str, Record]:
    """Records of all runs, each of which is trained in a directory of its name."""
    return {run.id: record(run, directory=f"{run.data_set}/{run.method}/{run.seed}") for run in plan.runs}


def page(plan: Plan, out: Path) -> str:
    return to_markdown("", list(diagnostic_sections(Summary(plan, finished(plan), out), out)))


def test_without_logs_there_is_nothing_to_say(tmp_path, plan):
    assert "##" not in page(plan, tmp_path)


def test_gradient_shares_are_those_of_uniform_weights(tmp_path, plan):
    for seed in "01":
        leave_stage(tmp_path / "ads" / "uniform" / seed / "pretrain", "uniform", None)
    leave_stage(tmp_path / "shop" / "difficulty" / "0" / "pretrain", "difficulty", None)
    text = page(plan, tmp_path).split("## Do easy fields dominate the gradient?")[1].split("## ")[0]
    # The easier half are `easy` and `easier`: 0.2 + 0.4; ranks of r 2, 1, 3, 4 and of shares 2, 4, 3, 1.
    assert "| ads | 4 | easier: 40 % | 60 % | 50 % | -0.80 | 4 |" in text
    assert "| easier | 40.0 % | 1.60 | 0.20 | +0.25 |\n| hard | 30.0 % | 1.20 | 0.80 | +0.25 |" in text
    assert "shop" not in text


def test_gradient_shares_are_not_those_of_another_objective(tmp_path, plan):
    leave_stage(tmp_path / "ads" / "uniform" / "0" / "pretrain", "uniform", None, objective="masked_features")
    assert "gradient?" not in page(plan, tmp_path)


def test_runs_without_probes_say_nothing_of_gradients(tmp_path, plan):
    leave_stage(tmp_path / "ads" / "uniform" / "0" / "pretrain", "uniform", None, probed=False)
    assert "gradient?" not in page(plan, tmp_path)


def test_held_out_reconstruction_is_a_mean_over_fields_and_seeds(tmp_path, plan):
    for seed, top_1 in enumerate((0.1, 0.2)):
        leave_stage(tmp_path / "ads" / "uniform" / str(seed) / "pretrain", "uniform", top_1)
    text = page(plan, tmp_path).split("## Reconstruction of held-out rows")[1].split("## ")[0]
    assert "| Uniform | 0.250 | 0.500 | 0.150 | 0.900 | 2 |" in text
    assert "| hard | 0.15 / 0.90 |" in text
    assert "| easy | - |" in text


def test_the_table_of_weights_and_the_plots_of_what_moved(tmp_path, plan):
    leave_stage(tmp_path / "ads" / "uniform" / "0" / "pretrain", "uniform", None)
    leave_stage(tmp_path / "ads" / "difficulty" / "0" / "pretrain", "difficulty", None)
    sections = list(diagnostic_sections(Summary(plan, finished(plan), tmp_path), tmp_path))
    text = to_markdown("", sections)
    assert "| ads: r (w) | Uniform | Hard up |" in text
    assert "| noise | 1.00 (1.00) | 1.00 (2.00) |" in text
    assert [card.title for card in sections[-1].plots] == [
        "ads, Uniform: difficulty s",
        "ads, Hard up: difficulty s",
        "ads, Hard up: weight w",
    ]
