import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tiny_artifact import raw_rows, write_tiny_artifact

from benchmarks.serving_load import SIZES, Answer, Load, report


def test_errors_count_as_requests_and_not_as_times_or_rows():
    answers = [Answer(1, 4.0, None), Answer(1, 900.0, "status 503"), Answer(8, 6.0, None)]
    lines = report(Load(2.0, answers, reload_seconds=0.4), num_clients=3)
    assert "| 1 | 2 | 1 | 1 | 0 | 4.0 ms | 4.0 ms |" in lines
    assert "| 8 | 1 | 0 | 0 | 4 | 6.0 ms | 6.0 ms |" in lines
    assert lines[5].startswith("| all | 3 | 1 |")
    assert lines[-1].endswith("Errors: status 503.")


def test_it_loads_a_server_and_replaces_its_artifact(tmp_path):
    write_tiny_artifact(tmp_path / "artifact")
    rows = raw_rows(50)
    names = sorted({name for row in rows for name in row})
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), tmp_path / "rows")
    options = [str(tmp_path / "artifact"), str(tmp_path / "rows"), "--seconds", "0.2", "--clients", "2"]
    command = [sys.executable, "-m", "benchmarks.serving_load", *options, "--out", str(tmp_path / "table.md")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=200)
    text = (tmp_path / "table.md").read_text()
    assert all(f"| {size} | " in text for size in SIZES)
    assert "No request failed." in text
