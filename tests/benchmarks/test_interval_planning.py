import json

import numpy as np
import pytest

from benchmarks.interval_planning import count, main, plan_of, write_files
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.raw import list_row_groups


def test_it_counts_the_rows_of_every_epoch_and_leaves_numbers_and_tables(tmp_path):
    shape = ["--rows", "1003", "5000", "--rows-per-group", "50", "--groups-per-file", "4"]
    options = [*shape, "--window-rows", "90", "--repeats", "1", "--results", str(tmp_path)]
    assert main(options) == 0
    numbers = json.loads((tmp_path / "interval_planning.json").read_text())
    small, large = numbers["sizes"]
    assert (small["rows"], small["files"], small["row_groups"]) == (1003, 6, 21)
    assert (large["rows"], large["files"], large["row_groups"]) == (5000, 25, 100)
    for size in (small, large):
        assert [epoch["ranks"] for epoch in size["epochs"]] == [1, 16, 64, 64]
        for epoch in size["epochs"]:
            assert (epoch["rows"], epoch["missed"], epoch["repeated"]) == (size["rows"], 0, 0)
            assert all(epoch[part]["peak_bytes"] > 0 for part in ("plan", "pieces", "windows"))
    text = (tmp_path / "interval_planning.md").read_text()
    assert "every row is handed out exactly once" in " ".join(text.split())
    assert "| 5,000 | 16 ranks, resumed by 64 |" in text


@pytest.mark.parametrize("rows", [40, 100, 130])
def test_the_files_hold_the_rows_that_were_asked_for(tmp_path, rows):
    write_files(tmp_path, rows, 10, 5)
    groups = list_row_groups([f"{tmp_path}/*.parquet"])
    assert [group.num_rows for group in groups] == [10] * (rows // 10)
    assert len({group.path for group in groups}) == -(-rows // 50)


def test_a_row_that_is_left_out_or_comes_twice_is_noticed(tmp_path):
    write_files(tmp_path, 100, 10, 5)
    groups = list_row_groups([f"{tmp_path}/*.parquet"])
    times = np.zeros(100, np.uint8)
    count(plan_of(groups, Cursor().on_lanes(4), 7), 24, times)
    assert ((times == 0).sum(), (times > 1).sum()) == (4, 0)
    count(plan_of(groups, Cursor().on_lanes(4), 7), 3, times)
    assert ((times == 0).sum(), (times > 1).sum()) == (4, 12)
