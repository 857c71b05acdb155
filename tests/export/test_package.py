"""From a checkpoint of two ranks to an artifact that scores as evaluation does."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from multirank import run_ranks
from tiny_run import files_below, tiny_config, write_tiny

from hetegen_rec.cli import main
from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.evaluation.results import read_evaluation
from hetegen_rec.export import package, parity
from hetegen_rec.jobs import Job, train
from hetegen_rec.scoring.files import score_files
from hetegen_rec.scoring.manifest import open_artifact
from hetegen_rec.scoring.scorer import Scorer
from hetegen_rec.training.checkpoint import read_info
from hetegen_rec.training.stored_tables import StoredWeights

ROW_WISE = "distributed.tables.default.sharding=[row_wise]"
SHORT = ["stages.joint.epochs=1", "stages.scratch.epochs=1", "checkpoints.keep=1"]


def train_both(directory: Path) -> None:
    """A rank's part: the network of the denoiser, and a backbone, on row-wise tables."""
    for stage, overrides in (("joint", []), ("scratch", ["model.backbone.name=deepfm"])):
        config = tiny_config(directory, *SHORT, ROW_WISE, *overrides)
        with start_runtime("cpu", 120) as runtime:
            train(stage)(Job(config, runtime, with_report=False))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have trained."""
    made = tmp_path_factory.mktemp("export")
    run_ranks(2, train_both, made)
    return made


def export(directory: Path, stage: str, output: Path, *overrides: str) -> int:
    backbone = ["model.backbone.name=deepfm"] if stage == "scratch" else []
    options = ["--stage", stage, "--output", str(output)]
    return main(["export", "--config", str(write_tiny(directory)), *options, *SHORT, *backbone, *overrides])


@pytest.fixture(scope="module")
def artifacts(directory: Path) -> dict[str, Path]:
    """One of each stage."""
    made = {stage: directory / "artifacts" / stage for stage in ("joint", "scratch")}
    for stage, path in made.items():
        assert export(directory, stage, path) == 0
    return made


@pytest.mark.parametrize("stage", ["joint", "scratch"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_raw_files_score_as_two_ranks_evaluated_them(directory, artifacts, tmp_path, stage, split):
    files = f"{directory}/raw/{split}/*.parquet"
    score_files(Scorer.load(artifacts[stage]), [files], tmp_path / "scores.parquet")
    found = pq.read_table(tmp_path / "scores.parquet")
    expected = pq.read_table(directory / "run" / stage / "predictions" / split).sort_by("row_id")
    assert found["row_id"].to_pylist() == expected["row_id"].to_pylist()
    np.testing.assert_allclose(
        found["probability"].to_numpy(), expected["probability"].to_numpy(), atol=1e-5, rtol=0
    )


def test_the_manifest_tells_what_it_was_made_of(directory, artifacts):
    manifest = open_artifact(artifacts["joint"]).manifest
    evaluation = read_evaluation(directory / "run" / "joint")
    assert (manifest.stage, manifest.step) == ("joint", evaluation["step"])
    assert manifest.metrics["test"]["auc"] == evaluation["splits"]["test"]["auc"]
    found = manifest.parity["aten"]
    assert found["split"] == "valid"
    assert found["rows"] == evaluation["splits"]["valid"]["n"]
    assert found["greatest_difference"] < 1e-5
    assert found["auc_of_training_model"] == pytest.approx(evaluation["splits"]["valid"]["auc"], abs=1e-6)
    assert manifest.vocabularies["user_id"].value_type == "integer"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", manifest.versions.get("commit", "0" * 40))


def test_the_manifest_tells_no_metrics_of_a_strategy(directory, tmp_path, monkeypatch):
    evaluation = read_evaluation(directory / "run" / "joint")
    evaluation["splits"]["test"]["inference"] = {"strategy": "symmetric", "passes_per_row": 3.0}
    monkeypatch.setattr(package, "read_evaluation", lambda _: evaluation)
    assert export(directory, "joint", tmp_path / "artifact", "export.parity_rows=10") == 0
    assert list(open_artifact(tmp_path / "artifact").manifest.metrics) == ["valid"]


def test_the_same_command_replaces_the_artifact_of_the_run_but_no_directory_of_others(directory, capsys):
    arguments = ["export", "--config", str(write_tiny(directory)), "--stage", "joint", *SHORT]
    assert main([*arguments, "export.tables=int8"]) == 0
    path = directory / "run" / "joint" / "artifact"
    assert open_artifact(path).manifest.precision == "int8"
    assert "of which tables (int8)" in capsys.readouterr().out
    assert main([*arguments, "--output", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert open_artifact(path).manifest.precision == "int8"


def test_the_sample_is_of_the_rows_that_were_prepared_however_they_are_stored(directory, tmp_path):
    rows = pq.read_table(f"{directory}/raw/valid")
    labels = pa.array([7.0] * 50 + rows["label"].to_pylist()[50:100])
    first = rows.slice(0, 100).set_column(rows.column_names.index("label"), "label", labels)
    second = rows.slice(100, 100)
    place = rows.column_names.index("segment")
    second = second.set_column(place, "segment", second["segment"].dictionary_encode())
    (tmp_path / "valid").mkdir()
    pq.write_table(first, tmp_path / "valid" / "a.parquet", row_group_size=50)  # the first row group is bad
    (tmp_path / "valid" / "b.parquet").write_bytes(b"no Parquet")
    pq.write_table(second, tmp_path / "valid" / "c.parquet")
    data = [
        "data.source=null",
        f"data.train={directory}/raw/train/*.parquet",
        f"data.valid={tmp_path}/valid/*.parquet",
        f"data.test={directory}/raw/test/*.parquet",
        f"data.prepared_dir={tmp_path}/prepared",
        "data.on_bad_shard=skip",
    ]
    assert export(directory, "joint", tmp_path / "artifact", *data) == 0
    found = open_artifact(tmp_path / "artifact").manifest.parity["aten"]
    assert found["rows"] == 150
    assert found["greatest_difference"] < 1e-5


@pytest.mark.parametrize(("tables", "share"), [("fp16", 0.5), ("int8", 0.31), ("int4", 0.26)])
def test_rows_in_few_bytes_score_nearly_alike(directory, artifacts, tmp_path, tables, share):
    assert export(directory, "joint", tmp_path / "a", f"export.tables={tables}") == 0
    small, large = (open_artifact(path).manifest for path in (tmp_path / "a", artifacts["joint"]))
    assert size_of_tables(small) <= share * size_of_tables(large) + 3 * 128  # headers of .npy
    found = small.parity["aten"]
    assert found["auc_of_training_model"] - found["auc"] <= 0.003
    assert 0 < found["greatest_difference"] < 0.1


def size_of_tables(manifest) -> int:
    return sum(manifest.files[name].bytes for group in manifest.tables for name in group.files.values())


@pytest.mark.parametrize(
    ("limit", "value", "tables"),
    [("_MOST_DIFFERENCE", 0.0, "fp32"), ("_MOST_AUC_LOSS", {"int8": -1.0}, "int8")],
)
def test_nothing_is_published_beyond_tolerance(
    directory, tmp_path, monkeypatch, capsys, limit, value, tables
):
    monkeypatch.setattr(parity, limit, value)
    assert export(directory, "scratch", tmp_path / "a", f"export.tables={tables}") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: back end aten: ")
    assert "nothing was published" in told
    assert {path.name for path in tmp_path.iterdir()} <= {".a.lock"}


REFUSED = {
    "pre-training": (["--stage", "pretrain"], "holds no checkpoint"),
    "another model": (["--stage", "scratch"], "does not fit this model"),
    "other sizes": (["--stage", "joint", "model.dim=16"], "another schema"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_one_line(directory, tmp_path, capsys, case):
    arguments, message = REFUSED[case]
    output = ["--output", str(tmp_path / "a")]
    assert main(["export", "--config", str(write_tiny(directory)), *output, *SHORT, *arguments]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ")
    assert message in told
    assert {path.name for path in tmp_path.iterdir()} <= {".a.lock"}


def test_a_table_is_read_in_pieces_of_its_stored_shards(directory):
    steps = directory / "run" / "joint" / "checkpoints"
    weights = StoredWeights(read_info(str(next(steps.glob("step-*")))))
    pieces = list(weights.table_blocks("user_id"))
    assert len(pieces) == 2  # one a rank: the table was cut by rows
    assert [start for start, _ in pieces] == [0, len(pieces[0][1])]


def test_an_export_changes_nothing_of_the_run(directory, tmp_path):
    before = files_below(directory / "run" / "scratch")
    assert export(directory, "scratch", tmp_path / "a") == 0
    assert files_below(directory / "run" / "scratch") == before
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["format_version"] == 1
