"""What a stage writes down: lines of log.jsonl, and the same numbers as named curves."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hetegen_rec.training.logs import RunLog

LINE = {
    "epoch": 0.5,
    "rows": 640,
    "samples_per_second": 1000.0,
    "loss": 1.5,
    "terms": {"generative": 0.9, "label": 0.6},
    "fields": {
        "user_id": {
            "loss": 5.0,
            "relative": 0.9,
            "difficulty": -0.1,
            "weight": 1.1,
            "gradient_share": 0.3,
            "label_cosine": -0.2,
        }
    },
    "learning_rate": {"tables": 0.05, "dense": 1e-3},
}


def test_every_number_of_a_line_is_a_curve_with_a_name_that_says_what_it_is(tmp_path):
    with RunLog(tmp_path, 0, is_evaluated=True, enabled=True, tensorboard=True) as log:
        log.write("train", 10, LINE)
        log.write("evaluation", 10, {"epoch": 0.5, "split": "valid", "auc": 0.75})
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {tag: round(curves.Scalars(tag)[0].value, 4) for tag in curves.Tags()["scalars"]}
    assert found == {
        "train/samples_per_second": 1000.0,
        "train/loss": 1.5,
        "train/terms/generative": 0.9,
        "train/terms/label": 0.6,
        "field_loss/user_id": 5.0,
        "field_relative_loss_r/user_id": 0.9,
        "field_difficulty_s/user_id": -0.1,
        "field_weight_w/user_id": 1.1,
        "field_gradient_share/user_id": 0.3,
        "field_label_cosine/user_id": -0.2,
        "train/learning_rate/tables": 0.05,
        "train/learning_rate/dense": 0.001,
        "evaluation/auc": 0.75,
    }
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert {key: first[key] for key in LINE} == LINE
    assert (first["event"], second["event"], second["step"]) == ("train", "evaluation", 10)


def test_other_ranks_write_nothing(tmp_path):
    with RunLog(tmp_path / "stage", 0, is_evaluated=True, enabled=False, tensorboard=True) as log:
        log.write("train", 10, LINE)
    assert not list(tmp_path.iterdir())


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_an_attempt_that_goes_on_drops_what_the_one_before_wrote_of_later_steps(tmp_path):
    with RunLog(tmp_path, 0, is_evaluated=True, enabled=True, tensorboard=True) as log:
        for step in range(10, 51, 10):
            log.write("train", step, {"loss": 1.0})
    with RunLog(tmp_path, 30, is_evaluated=True, enabled=True, tensorboard=True) as log:
        assert steps_in(tmp_path / "log.jsonl") == [10, 20, 30]
        log.write("train", 40, {"loss": 2.0})
    assert steps_in(tmp_path / "log.jsonl") == [10, 20, 30, 40]
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in curves.Scalars("train/loss")] == [
        (10, 1.0),
        (20, 1.0),
        (30, 1.0),
        (40, 2.0),
    ]


CUT_OFF = {
    "in the middle of a line": '{"event": "train", "step": 20, "lo',
    "in the middle of a number": '{"event": "train", "step": 2',
    "behind a line": "",
    "no object": "[1, 2]\n",
    "no step": '{"event": "train"}\n',
    "what a crashed host left": "\0\udcff" * 100,
}


@pytest.mark.parametrize("rest", CUT_OFF.values(), ids=CUT_OFF)
def test_a_line_that_a_kill_cut_off_is_dropped(rest, tmp_path):
    path = tmp_path / "log.jsonl"
    text = json.dumps({"event": "train", "step": 10}) + "\n" + rest
    path.write_bytes(text.encode(errors="surrogateescape"))
    with RunLog(tmp_path, 20, is_evaluated=True, enabled=True, tensorboard=False) as log:
        log.write("train", 30, {"loss": 1.0})
    assert steps_in(path) == [10, 30]


def test_an_evaluation_that_is_to_be_repeated_is_dropped(tmp_path):
    with RunLog(tmp_path, 0, is_evaluated=True, enabled=True, tensorboard=False) as log:
        for step in (10, 20):
            log.write("train", step, {"loss": 0.5})
            log.write("evaluation", step, {"auc": 0.6})
    with RunLog(tmp_path, 20, is_evaluated=False, enabled=True, tensorboard=False) as log:
        log.write("evaluation", 20, {"auc": 0.7})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines] == [
        ("train", 10),
        ("evaluation", 10),
        ("train", 20),
        ("evaluation", 20),
    ]
    assert lines[-1]["auc"] == 0.7
