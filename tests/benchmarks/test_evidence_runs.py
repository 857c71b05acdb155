"""Records, sessions of runs side by side, one run in its process, and the command."""

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hetegen_stand_in import StandIn
from small_grid import FOLLOWED, METHODS, grid_values, load, plan_of, plan_with_strategy, record

from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import running
from benchmarks.evidence.plan import Plan, Run
from benchmarks.evidence.records import FILE_NAME, Ledger, Record
from benchmarks.evidence.running import execute, prepare
from benchmarks.evidence.session import carry_out
from benchmarks.evidence.slices import slice_metrics
from benchmarks.evidence.workers import StoppedError, Workers
from hetegen_rec.evaluation.significance import PredictionTable


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of(tmp_path)


def test_a_line_that_a_kill_cut_off_costs_one_record(tmp_path, plan):
    first, second, third = list(plan.runs)[:3]
    ledger = Ledger(tmp_path)
    ledger.add(record(first))
    ledger.add(record(second))
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[:-20])
    Ledger(tmp_path).add(record(third))
    assert set(Ledger(tmp_path).done) == {first.id, third.id}


def test_the_newest_record_of_a_run_counts(tmp_path, plan):
    run = next(iter(plan.runs))
    for status in ("failed", "done"):
        Ledger(tmp_path).add(record(run, status=status))
    assert set(Ledger(tmp_path).done) == {run.id}
    assert not Ledger(tmp_path).failed


def test_finished_runs_of_another_machine_count_and_do_not_replace_own_ones(tmp_path, plan):
    here, both, there, broken = list(plan.runs)[:4]
    ledger, other = Ledger(tmp_path / "here"), Ledger(tmp_path / "there")
    for run in (here, both):
        ledger.add(replace(record(run), commit="here"))
    for run in (both, there):
        other.add(replace(record(run), commit="there"))
    other.add(record(broken, status="failed"))
    assert ledger.adopt(tmp_path / "there" / FILE_NAME) == 1
    found = Ledger(tmp_path / "here").done
    assert {run: one.commit for run, one in found.items()} == {
        here.id: "here",
        both.id: "here",
        there.id: "there",
    }


def test_records_that_are_not_there_are_an_error(tmp_path, plan):
    with pytest.raises(FileNotFoundError):
        Ledger(tmp_path).adopt(tmp_path / "none.jsonl")


def test_a_session_does_every_run_once_and_the_next_one_only_what_failed(tmp_path, plan):
    calls = []
    unlucky = plan.search_runs("shop", "uniform")[1]
    broken = {unlucky.id}

    def execute(run, core):
        calls.append((run.id, core))
        return record(run, status="failed" if run.id in broken else "done")

    told = []
    carry_out(plan, Ledger(tmp_path), execute, [0, 1], lambda *about: told.append(about))
    assert len(calls) == len({run for run, _ in calls}) == plan.num_runs == len(told)
    assert {core for _, core in calls} == {0, 1}
    assert told[-1][1] == 0
    calls.clear()
    broken.clear()
    carry_out(plan, Ledger(tmp_path), execute, [0, 1], lambda *about: None)
    assert [run for run, _ in calls] == [unlucky.id]


def test_no_more_runs_at_a_time_than_cores(tmp_path, plan):
    cores_in_use, most = [], []
    together = threading.Barrier(2, timeout=20)

    def execute(run, core):
        cores_in_use.append(core)
        most.append(sorted(cores_in_use))
        if run.seed == 0:
            together.wait()  # the other is under way, too
        cores_in_use.remove(core)
        return record(run)

    carry_out(plan, Ledger(tmp_path), execute, [4, 5], lambda *about: None)
    assert [4, 5] in most
    assert all(len(set(some)) == len(some) for some in most)


def test_a_stopped_run_leaves_no_record(tmp_path, plan):
    def execute(run, core):
        raise StoppedError

    with pytest.raises(StoppedError):
        carry_out(plan, Ledger(tmp_path), execute, [0], lambda *about: None)
    assert not Ledger(tmp_path).done
    assert not Ledger(tmp_path).failed


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    program = StandIn(tmp_path)
    monkeypatch.setattr(running, "HETEGEN", program)
    return program


@pytest.fixture
def do(tmp_path: Path) -> Callable[[Run], Record]:
    """Carries out a run."""
    return partial(execute, core=0, out=tmp_path / "out", workers=Workers(), commit="abc")


def test_a_run_is_its_stages_and_its_record_what_they_left(tmp_path, plan, stand_in, do):
    out = tmp_path / "out"
    run = plan.search_runs("ads", "uniform")[0]
    prepare(run, Workers(), out / "logs" / "prepare.log", 0)
    found = do(run)
    assert stand_in.calls() == ["prepare", "pretrain", "finetune"]
    assert found.status == "done"
    assert found.wall_seconds >= found.cpu_seconds > 0
    assert found.directory == f"runs/ads/{run.training_id}"
    assert found.value("test", "auc") == pytest.approx(0.605)
    assert "roc" not in found.splits["test"]
    assert found.splits["test"]["slices"]["cold_users"]["n"] == 6
    assert found.peak_memory_mib > 0
    assert list(running.predictions_dir(out, run.id).glob("*.parquet"))
    json.dumps(found.splits)


def test_all_of_a_run_happens_in_one_process_of_its_own(tmp_path, plan, stand_in, do):
    runs = plan.search_runs("ads", "uniform")
    prepare(runs[0], Workers(), tmp_path / "prepare.log", 0)
    stand_in.calls()
    for run in runs:
        do(run)
    processes = stand_in.processes()
    assert processes == [processes[0]] * 2 + [processes[2]] * 2
    assert len({processes[0], processes[2], str(os.getpid())}) == 3


def test_scores_of_other_settings_are_made_anew(tmp_path, stand_in, do):
    plan = plan_with_strategy(tmp_path)
    plain = plan.search_runs("ads", "scratch")[0]
    other = plan.chosen_runs("ads", "other", {plain.id: record(plain)})[0]
    prepare(plain, Workers(), tmp_path / "prepare.log", 0)
    scores = [do(run).value("test", "auc") for run in (plain, other, plain)]
    assert scores == pytest.approx([0.605, 0.609, 0.605])
    verbs = stand_in.calls()
    assert verbs == ["prepare", "scratch", "scratch", "evaluate", "scratch"]


def test_a_run_that_fails_says_why(plan, stand_in, do):
    stand_in.breaks()
    found = do(plan.first_run("ads"))
    assert found.status == "failed"
    assert found.error.startswith("exit code 2: error: out of luck")


def nothing(words) -> int:
    return 0


def test_a_stage_that_ended_before_it_was_done_is_no_result(plan, monkeypatch, do):
    monkeypatch.setattr(running, "HETEGEN", nothing)
    found = do(plan.first_run("ads"))
    assert found.status == "failed"
    assert "scratch was stopped before it was done" in found.error


def test_a_followed_log_leaves_means_by_way(tmp_path, stand_in, do):
    found = do(plan_of(tmp_path, incremental=FOLLOWED).sequences[2])
    assert stand_in.calls() == ["incremental"]
    assert (found.status, found.data_set, found.seed) == ("done", "ads", 1)
    assert list(found.ways) == ["finetune", "retrain", "fesail"]
    retrained = found.ways["retrain"]
    assert (retrained["auc"], retrained["log_loss"]) == pytest.approx((0.661, 0.5))
    assert (retrained["seconds"], retrained["rows"], retrained["gauc"]) == (2.5, 235, None)
    assert retrained["auc_by_period"] == pytest.approx({"3": 0.611, "4": 0.711})
    assert json.loads(json.dumps(found.ways)) == found.ways


def test_a_log_that_was_not_followed_to_its_end_is_no_result(tmp_path, stand_in, do):
    stand_in.is_stopped()
    found = do(plan_of(tmp_path, incremental=FOLLOWED).sequences[0])
    assert found.status == "failed"
    assert "incremental was stopped before it was done" in found.error
    assert not found.ways


def test_slices_count_users_and_items_by_their_training_rows(tmp_path):
    config = Plan(load(tmp_path), tmp_path / "out", tmp_path).first_run("ads").config
    place = Path(config.data.prepared_dir) / "test"
    place.mkdir(parents=True)
    columns = {
        "__row_id": [2, 0, 1, 4, 3, 5],
        "__timestamp": [0] * 6,
        "__user_key": [7, 7, 0, 8, 9, 8],  # 0: no user
        "__user_rows": [5, 0, 0, 6, 1, 6],
        "__item_rows": [10, 11, 0, 3, 50, -1],  # -1: no item
    }
    pq.write_table(pa.table(columns), place / "part-0.parquet")
    labels = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    scores = np.array([0.1, 0.9, 0.3, 0.4, 0.2, 0.5])
    found = slice_metrics(config, "test", PredictionTable(np.arange(6), scores, labels, None))
    assert found["cold_users"] == {"n": 3, "positives": 1, "auc": 0.5}
    assert found["tail_items"] == {"n": 3, "positives": 3, "auc": None}


def test_the_command_goes_on_until_all_is_done_and_then_does_nothing(tmp_path, stand_in, capsys):
    data_sets = {"ads": grid_values(tmp_path)["data_sets"]["ads"]}
    followed = {"seeds": 1, "data_sets": {"ads": {}}}
    load(
        tmp_path, data_sets=data_sets, methods={"scratch": METHODS["scratch"]}, seeds=2, incremental=followed
    )
    results = tmp_path / "page.md"
    command = [
        str(tmp_path / "grid.yaml"),
        "--out",
        str(tmp_path / "out"),
        "--results",
        str(results),
        "--jobs",
        "2",
    ]
    stand_in.breaks()
    assert evidence.main(command) == 1
    assert not results.exists()
    assert "error: out of luck" in (tmp_path / "out" / "evidence.md").read_text()
    stand_in.works()
    stand_in.calls()
    assert evidence.main(command) == 0
    scratch = ["scratch"] * 3  # two options, and another seed
    assert sorted(stand_in.calls()) == ["incremental", "prepare", *scratch]
    assert "| From scratch | **0.6100 ± 0.0071** |" in results.read_text()
    assert "| Retrained | 0.6510 |" in results.read_text()
    assert "AUC 0.6500 by finetune, 0.6510 by retrain, 0.6520 by fesail" in capsys.readouterr().out
    assert evidence.main(command) == 0
    assert not stand_in.calls()
    assert "0 of 4 runs left" in capsys.readouterr().out

    elsewhere = tmp_path / "elsewhere"
    records = str(tmp_path / "out" / FILE_NAME)
    page_of_records = [command[0], "--out", str(elsewhere), "--records", records, "--page-only"]
    assert evidence.main(page_of_records) == 0
    assert not stand_in.calls()
    assert "| From scratch | **0.6100 ± 0.0071** |" in (elsewhere / "evidence.md").read_text()


def test_real_models_are_trained_scored_in_two_ways_and_compared(tmp_path, capfd):
    one = {**grid_values(tmp_path)["data_sets"]["ads"], "search": {"only": {}}}
    data_sets = {"ads": {**one, "epochs": {"total": 2, "pretrain": 1}}}
    strategy = {"title": "Regenerated", "of": "uniform", "evaluate": {"inference.strategy": "symmetric"}}
    methods = {"uniform": METHODS["uniform"], "symmetric": strategy}
    load(tmp_path, data_sets=data_sets, methods=methods, seeds=1, baseline="uniform")
    out = tmp_path / "out"
    status = evidence.main([str(tmp_path / "grid.yaml"), "--out", str(out), "--jobs", "1"])
    assert status == 0, capfd.readouterr()
    plain, regenerated = Ledger(out).done.values()
    assert plain.directory == regenerated.directory
    assert regenerated.value("test", "inference", "passes_per_row") > 1.0
    assert plain.value("test", "auc") != regenerated.value("test", "auc")
    assert "## Test-time strategies" in (out / "evidence.md").read_text()
    assert not list((out / "runs").rglob("report.html"))


def test_a_wrong_grid_ends_with_one_line(tmp_path, capsys):
    assert evidence.main([str(tmp_path / "nothing.yaml")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/nothing.yaml: cannot be read")
