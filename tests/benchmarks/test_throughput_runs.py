import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from multirank import run_ranks

from benchmarks.throughput.click_log import LogConfig, write_click_log
from benchmarks.throughput.runner import main, run
from benchmarks.throughput.scenario import SCENARIOS, cases_of, load_scenario
from hetegen_rec.distributed.runtime import start_runtime

TINY = [
    "log.rows=96",
    "log.fields=3",
    "log.table_rows=60",
    "log.rows_per_group=40",
    "train.batch_size=16",
    "train.tensorboard=false",
    "model.reconstruction.full_softmax_max=8",  # ids have in-batch candidates, as those of a large table
]


WITH_PEERS = {"peers"}
"""Scenarios that would install another library first; test_throughput_peers.py has their parts."""


@pytest.mark.parametrize("name", sorted({path.stem for path in SCENARIOS.glob("*.yaml")} - WITH_PEERS))
def test_a_scenario_times_one_variant_of_each_kind(name):
    scenario = load_scenario(name).model_copy(update={"repeats": 1, "steps": 2, "warm_rounds": 0})
    # What its others override, test_throughput_scenario.py checks.
    kinds = {(case.measure, case.stage, case.before[-1:]): case for case in cases_of(scenario, TINY)}
    cases = list(kinds.values())
    with start_runtime("cpu") as runtime:
        result = run(scenario, cases, runtime)
    assert list(result.summaries) == [case.name for case in cases]
    for case in cases:
        summary = result.summaries[case.name]
        assert len(summary.seconds_per_step) == 1
        assert all(seconds > 0 for seconds in summary.seconds_per_step)
        if case.measure in ("trainer", "bare"):
            assert summary.num_steps == 2
        elif case.measure == "reader":
            assert summary.num_steps == 6
    assert set(result.bounds) == ({case.name for case in cases} if scenario.limits else set())
    assert all(bound.seconds > 0 and bound.flops > 0 for bound in result.bounds.values())


def measure(options):
    assert main(options) == 0


def test_two_ranks_leave_numbers_and_a_table(tmp_path):
    options = ["bare_loop", "--repeats", "2", "--steps", "2", "--results", str(tmp_path), *TINY]
    run_ranks(2, measure, options)
    numbers = json.loads((tmp_path / "bare_loop.json").read_text())
    assert [one["name"] for one in numbers["variants"]][:2] == ["bare loop", "trainer"]
    assert numbers["variants"][0]["ratio"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    assert numbers["variants"][0]["rows_per_step"] == 16
    assert {"commit", "processor", "versions", "threads"} <= set(numbers["made"])
    text = (tmp_path / "bare_loop.md").read_text()
    assert "| `trainer` |" in text
    assert "torchrun --nproc-per-node 2 -m benchmarks.run bare_loop" in text


def test_variants_with_ranks_are_jobs_of_their_own(tmp_path):
    path = tmp_path / "ranks.yaml"
    path.write_text("question: Does it run?\nrepeats: 1\nvariants: [{name: two, ranks: 1, jobs: 2}]\n")
    options = [str(path), "--steps", "2", "--results", str(tmp_path), *TINY]
    assert main(options) == 0
    numbers = json.loads((tmp_path / "ranks.json").read_text())
    assert (numbers["made"]["ranks"], numbers["made"]["threads"]) == (None, 1)
    (variant,) = numbers["variants"]
    assert (variant["num_steps"], variant["rows_per_step"]) == (2, 16)


def test_a_wrong_key_ends_with_a_message(capsys):
    assert main(["step", "model.width=3"]) == 2
    assert "model.width" in capsys.readouterr().err


def test_the_rows_follow_from_the_seed_and_the_statistics_count_them(tmp_path):
    config = LogConfig(fields=2, table_rows=200, sequence_length=3, rows=5_000)
    log, again = (write_click_log(config, tmp_path / name) for name in ("a", "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert log.statistics.fingerprint == again.statistics.fingerprint
    counts = log.statistics.fields["id_00"].counts
    assert counts[:2].sum() == 0
    assert counts.sum() == 5_000
    assert log.statistics.fields["history"].counts.sum() == 15_000
    # Zipf: the most frequent of 100 ids has 1 / log2(101) of all.
    assert counts.max() / 5_000 == pytest.approx(np.log(2) / np.log(101), abs=0.03)


def test_the_rows_are_the_same_in_however_many_files_and_row_groups(tmp_path):
    config = LogConfig(fields=2, table_rows=200, sequence_length=3, rows=1_000)
    log = write_click_log(config, tmp_path / "log.parquet")
    cut = config.model_copy(update={"rows_per_group": 70, "rows_per_file": 300})
    parts = write_click_log(cut, tmp_path / "cut" / "log.parquet")
    assert [path.name for path in parts.paths] == [f"log-0000{number}.parquet" for number in range(4)]
    assert pq.ParquetFile(parts.paths[0]).num_row_groups == 5
    rows = pa.concat_tables(map(pq.read_table, parts.paths))
    assert rows.equals(pq.read_table(log.paths[0]))
    assert parts.statistics.fingerprint == log.statistics.fingerprint
