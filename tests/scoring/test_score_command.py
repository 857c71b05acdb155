"""`hetegen score ARTIFACT IN... OUT`."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_artifact import SCHEMA, raw_rows

from hetegen_rec import main as command
from hetegen_rec.scoring.scorer import Scorer


def write(path, rows, row_group_size=None):
    names = [field.name for field in SCHEMA.fields]
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    pq.write_table(table, path, row_group_size=row_group_size)
    return table


def test_files_are_scored_in_order_and_in_parts(artifact, tmp_path, capsys):
    first = write(tmp_path / "a.parquet", raw_rows(40), row_group_size=7)
    second = write(tmp_path / "b.parquet", raw_rows(25, seed=1))
    output = tmp_path / "scores.parquet"
    assert command.main(["score", str(artifact), str(tmp_path / "[ab].parquet"), str(output)]) == 0
    assert "scored 65 rows by aten" in capsys.readouterr().out
    scores = pq.read_table(output)
    assert scores["row_id"].to_pylist() == list(range(65))
    expected = Scorer.load(artifact).score(pa.concat_tables([first, second]))
    np.testing.assert_allclose(scores["probability"].to_numpy(), expected, atol=1e-6)


def test_scores_replace_scores_and_nothing_else(artifact, tmp_path, capsys):
    for name in "ab":
        write(tmp_path / f"{name}.parquet", raw_rows(10))
    inputs = [str(tmp_path / f"{name}.parquet") for name in "ab"]
    before = (tmp_path / "b.parquet").read_bytes()
    assert command.main(["score", str(artifact), *inputs]) == 2  # the shell's `*.parquet`, without an output
    assert "b.parquet: is there already" in capsys.readouterr().err
    assert (tmp_path / "b.parquet").read_bytes() == before
    for paths in (inputs[:1], inputs):
        assert command.main(["score", str(artifact), *paths, str(tmp_path / "scores")]) == 0
    assert len(pq.read_table(tmp_path / "scores")) == 20


def spoil(path):
    path.write_bytes(path.read_bytes()[:-8])


FAILURES = {
    "no artifact": (
        lambda d: ["score", str(d), str(d / "in.parquet"), str(d / "out.parquet")],
        "no artifact",
    ),
    "no input": (
        lambda d: ["score", "ARTIFACT", str(d / "none.parquet"), str(d / "out.parquet")],
        "no file matches",
    ),
    "damaged input": (
        lambda d: [
            spoil(d / "in.parquet"),
            "score",
            "ARTIFACT",
            str(d / "in.parquet"),
            str(d / "out.parquet"),
        ][1:],
        "in.parquet",
    ),
    "no back end": (
        lambda d: ["score", "--backend", "fbgemm", "ARTIFACT", str(d / "in.parquet"), str(d / "out.parquet")],
        "no back end 'fbgemm'",
    ),
    "no directory": (
        lambda d: ["score", "ARTIFACT", str(d / "in.parquet"), str(d / "none" / "out.parquet")],
        "none",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_are_one_line_and_leave_no_output(artifact, tmp_path, capsys, case):
    write(tmp_path / "in.parquet", raw_rows(5))
    arguments, message = FAILURES[case]
    given = [str(artifact) if word == "ARTIFACT" else word for word in arguments(tmp_path)]
    assert command.main(given) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ")
    assert message in told
    assert "\n" not in told
    assert not list(tmp_path.glob("*out.parquet*"))
