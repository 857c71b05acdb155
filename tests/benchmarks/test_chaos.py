"""The kill harness: what it notices, what it draws, and one training that is really killed."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from multirank import run_ranks

from benchmarks.chaos import __main__ as chaos
from benchmarks.chaos import running
from benchmarks.chaos.plan import MOMENTS, RESUME_POINTS, VICTIMS, draw_trial
from benchmarks.chaos.rank import main as rank_main
from benchmarks.chaos.records import (
    Attempt,
    AttemptId,
    Completed,
    RowsFile,
    TrainedRows,
    note_completed,
    read_attempts,
    read_completed,
    write_passes,
)
from benchmarks.chaos.running import Verdict
from benchmarks.chaos.verdict import (
    Outcome,
    effective_steps,
    resume_problems,
    row_problems,
    tensor_problems,
    value_problems,
)

NAN = float("nan")


def flipped(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """A copy in which the lowest bit of one element is another."""
    copy = tensor.clone()
    copy.view(-1).view(torch.int32)[index] ^= 1
    return copy


WEIGHTS = torch.tensor([[1.0, -2.0], [NAN, 0.0]])

TENSORS = {
    "one bit": ({"w": flipped(WEIGHTS, 1)}, ["w differs in 1 of 4 elements"]),
    "one bit of a NaN": ({"w": flipped(WEIGHTS, 2)}, ["w differs in 1 of 4 elements"]),
    "the sign of zero": ({"w": torch.tensor([[1.0, -2.0], [NAN, -0.0]])}, ["w differs in 1 of 4 elements"]),
    "another type": ({"w": WEIGHTS.double()}, ["w is torch.float64 [2, 2], not torch.float32 [2, 2]"]),
    "another shape": ({"w": WEIGHTS.view(4)}, ["w is torch.float32 [4], not torch.float32 [2, 2]"]),
    "gone": ({}, ["w is missing"]),
    "new": ({"w": WEIGHTS, "x": WEIGHTS}, ["x is new"]),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_are_compared_bit_by_bit(case):
    found, problems = TENSORS[case]
    assert tensor_problems({"w": WEIGHTS}, found) == problems


def test_equal_tensors_are_no_problem():
    tensors = {"w": WEIGHTS, "transposed": WEIGHTS.t(), "step": torch.tensor(3.0), "none": torch.empty(0, 2)}
    assert tensor_problems(tensors, {name: tensor.clone() for name, tensor in tensors.items()}) == []


def test_values_other_than_tensors_are_compared_too():
    expected = {"best checkpoint": 7, "state/step": 1, "state/best_auc": 0.5}
    found = {"best checkpoint": 5, "state/step": 1, "state/epoch": 2}
    assert value_problems(expected, found) == [
        "best checkpoint is 5, not 7",
        "state/best_auc is None, not 0.5",
        "state/epoch is 2, not None",
    ]


OUTCOME = Outcome(tensors={}, values={}, num_rows=5, epochs=2, steps=4)


def steps_of(*rows: tuple[int, list[int], list[int]]) -> dict[int, dict[int, TrainedRows]]:
    """Steps from 1 on: the epoch, and the rows of ranks 0 and 1."""
    return {
        step: {rank: TrainedRows(epoch, tuple(share)) for rank, share in enumerate(shares)}
        for step, (epoch, *shares) in enumerate(rows, start=1)
    }


WELL = steps_of((0, [0, 1], [3, 4]), (0, [2], []), (1, [4, 2], [0, 1]), (1, [3], []))

ROWS = {
    "twice in a step": ({1: WELL[1] | {1: TrainedRows(0, (3, 3))}}, ["row 4 never", "row 3 2 times"]),
    "in both ranks": ({2: WELL[2] | {1: TrainedRows(0, (1,))}}, ["row 1 2 times"]),
    "missing": ({2: WELL[2] | {0: TrainedRows(0, ())}}, ["row 2 never"]),
    "in another epoch": ({2: WELL[2] | {0: TrainedRows(1, (2,))}}, ["row 2 never", "row 2 2 times"]),
    "of no training row": ({2: WELL[2] | {1: TrainedRows(0, (5,))}}, ["row 5 1 times"]),
    "of a third epoch": ({4: WELL[4] | {1: TrainedRows(2, (0,))}}, ["epoch 2: row 0 1 times"]),
    "a rank without a record": ({2: {0: WELL[2][0]}}, ["step 2 is known of ranks [0] only"]),
    "a step too many": ({5: WELL[2] | {0: TrainedRows(1, ())}}, ["step 5 is one too many"]),
}


def test_every_row_once_in_each_epoch_is_no_problem():
    assert row_problems(WELL, 2, OUTCOME) == []


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_are_not_trained_exactly_once_are_told(case):
    changed, problems = ROWS[case]
    found = row_problems(WELL | changed, 2, OUTCOME)
    assert [text for text in problems if not any(line.endswith(text) for line in found)] == []
    assert len(found) == len(problems)


def test_an_attempt_takes_back_what_lies_behind_its_start():
    before = Attempt(AttemptId(0, 0), 0, steps_of(*[(0, [step], []) for step in range(4)]))
    after = Attempt(AttemptId(0, 1), 2, {3: {0: TrainedRows(0, (9,)), 1: TrainedRows(0, ())}})
    steps = effective_steps([before, after])
    assert sorted(steps) == [1, 2, 3]
    assert steps[2] == before.steps[2]
    assert steps[3][0].rows == (9,)


@pytest.mark.parametrize(("start", "problems"), [(14, 0), (21, 0), (7, 1), (0, 1)])
def test_training_again_what_a_checkpoint_held_is_told(start, problems):
    first, second = AttemptId(0, 0), AttemptId(1, 0)
    completed = [Completed(first, 7), Completed(first, 14), Completed(second, 28)]
    assert len(resume_problems([Attempt(first, 0), Attempt(second, start)], completed)) == problems


def test_a_line_that_a_kill_cut_off_is_no_record(tmp_path):
    for rank in range(2):
        file = RowsFile(tmp_path, AttemptId(1, 0), rank, start=7)
        file.add(8, TrainedRows(0, (3, 4)))
        file.add(9, TrainedRows(0, (1, 2)))
    torn = tmp_path / "rows" / "1.0.0.jsonl"
    torn.write_text(torn.read_text()[:-4])
    (attempt,) = read_attempts(tmp_path)
    assert (attempt.id, attempt.start) == (AttemptId(1, 0), 7)
    assert {step: sorted(ranks) for step, ranks in attempt.steps.items()} == {8: [0, 1], 9: [1]}


def test_completed_checkpoints_come_back_in_order(tmp_path):
    assert read_completed(tmp_path) == []
    completed = [Completed(AttemptId(0, 0), 14), Completed(AttemptId(0, 1), 21)]
    for one in completed:
        note_completed(tmp_path, one)
    assert read_completed(tmp_path) == completed


EVERYWHERE = dict.fromkeys(MOMENTS, 40)
PASSES = [EVERYWHERE, {name: 40 for name in MOMENTS if name not in ("marker", "pruning")}]


def test_three_rounds_of_trials_have_all_victims_at_every_moment():
    trials = [draw_trial(0, index, PASSES) for index in range(3 * len(MOMENTS))]
    assert Counter((trial.moment, trial.kills[-1].victims) for trial in trials) == {
        (moment, victims): 1 for moment in MOMENTS for victims in VICTIMS
    }
    assert {trial.launcher for trial in trials} == {"hetegen", "torchrun"}


def test_kills_are_such_as_come():
    for index in range(200):
        trial = draw_trial(1, index, PASSES)
        for kill in trial.kills:
            last = RESUME_POINTS if kill.moment == "start-up" else PASSES[kill.rank][kill.moment]
            assert 1 <= kill.occurrence <= last
        assert len(trial.kills) == (2 if trial.moment == "start-up" else 1)


def test_a_trial_follows_from_seed_and_index():
    assert draw_trial(3, 5, PASSES) == draw_trial(3, 5, PASSES)
    assert draw_trial(3, 5, PASSES) != draw_trial(4, 5, PASSES)


def test_a_failed_trial_is_told_and_kept(tmp_path, monkeypatch, capsys):
    def reference(directory):
        directory.mkdir()
        for rank in range(2):
            write_passes(directory, rank, EVERYWHERE)
        return OUTCOME

    def trial(trial, directory, reference):
        directory.mkdir()
        return Verdict([], ["w differs"] if trial.index == 1 else [], [], attempts=2)

    monkeypatch.setattr(chaos, "run_reference", reference)
    monkeypatch.setattr(chaos, "run_trial", trial)
    page = tmp_path / "chaos.md"
    assert chaos.main(["--trials", "3", "--out", str(tmp_path), "--results", str(page)]) == 1
    assert "w differs" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("chaos-*/trial-*")] == ["trial-1"]
    assert "| all |  | 3 | 1 | 1 | 1 | 3 | 2 | 3 |" in page.read_text()


def undisturbed_rank(*words: str) -> None:
    """What each rank does whom no launcher will start again."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
    sys.argv[1:] = words
    assert rank_main() == 0


def test_a_training_killed_while_it_writes_ends_like_an_undisturbed_one(tmp_path, monkeypatch):
    launch = running._launch

    def with_a_launcher_if_restarted(command: list[str], log: Path) -> int:
        *_, directory, number, _, _, _, restarts = command
        if restarts != "0":
            return launch(command, log)
        run_ranks(running.RANKS, undisturbed_rank, directory, number)
        return 0

    monkeypatch.setattr(running, "_launch", with_a_launcher_if_restarted)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as `run_ranks` has it, so that sums are rounded alike
    page = tmp_path / "chaos.md"
    small = ["data.source.rows=752", "stages.joint.epochs=1", "checkpoints.every_steps=2"]
    options = ["--trials", "1", "--first", "3", "--out", str(tmp_path), "--results", str(page)]
    assert chaos.main([*options, *small]) == 0
    assert "| all |  | 1 | 1 | 0 | 0 | 1 | 1 | 1 |" in page.read_text()
    assert not list(tmp_path.glob("chaos-*"))
