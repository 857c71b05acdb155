"""Bad input: one clear line that names the culprit, exit code 2, and nothing half-written."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import files_below, write_config

from hetegen_rec.cli import main

ROWS = {"train": 60, "valid": 20, "test": 20}
Values = dict[str, Any]


def log(num_rows: int) -> pa.Table:
    rng = np.random.default_rng(num_rows)
    return pa.table(
        {
            "click": pa.array(rng.integers(0, 2, num_rows), pa.int8()),
            "user": rng.integers(0, 9, num_rows),
            "city": pa.array([f"city {value}" for value in rng.integers(0, 5, num_rows)]),
            "age": rng.normal(40, 9, num_rows),
        }
    )


def values_of(directory: Path) -> Values:
    return {
        "name": "bad",
        "run_dir": str(directory / "run"),
        "data": {
            **{split: f"{directory}/raw/{split}.parquet" for split in ROWS},
            "prepared_dir": str(directory / "prepared"),
        },
        "features": {
            "label": "click",
            "fields": [
                {"name": "user", "kind": "id"},
                {"name": "city", "kind": "categorical"},
                {"name": "age", "kind": "numeric", "num_buckets": 4},
            ],
        },
        "model": {"dim": 8, "denoiser": {"num_layers": 1}, "ctr": {"hidden": [8]}},
        "train": {"batch_size": 10, "eval_batch_size": 20, "tensorboard": False},
        "stages": {"scratch": {"epochs": 1}, "pretrain": {"epochs": 1}},
    }


def write_raw(directory: Path) -> None:
    (directory / "raw").mkdir()
    for split, num_rows in ROWS.items():
        pq.write_table(log(num_rows), directory / "raw" / f"{split}.parquet")


def run(directory: Path, values: Values, *arguments: str) -> int:
    verb, *rest = arguments
    return main([verb, "--config", str(write_config(directory, values)), *rest])


def rewrite(split: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "raw" / f"{split}.parquet"
        pq.write_table(change(pq.read_table(path)), path)

    return damage


def truncate(split: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "raw" / f"{split}.parquet"
        path.write_bytes(path.read_bytes()[:-400])

    return damage


def with_column(name: str, values: Callable[[pa.Table], Any]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(table.column_names.index(name), name, [values(table)])


def with_label_two(table: pa.Table) -> pa.Table:
    labels = table["click"].to_pylist()
    labels[7] = 2
    return with_column("click", lambda _: pa.array(labels))(table)


@dataclass(frozen=True)
class BadInput:
    name: str
    says: tuple[str, ...]
    """What the error line must hold."""
    damage: Callable[[Path], None] = lambda directory: None
    overrides: tuple[str, ...] = ()
    verb: str = "scratch"


CASES = (
    BadInput(
        "missing column",
        ("raw/valid.parquet", "no column 'city'", "`column` of 'city'"),
        rewrite("valid", lambda table: table.drop_columns("city")),
    ),
    BadInput(
        "missing label column",
        ("raw/train.parquet", "no column 'click'", "features.label"),
        rewrite("train", lambda table: table.drop_columns("click")),
    ),
    BadInput(
        "wrong type",
        ("raw/train.parquet", "'age'", "expected numbers, found", "string"),
        rewrite("train", with_column("age", lambda table: table["city"])),
    ),
    BadInput(
        "another type in another split",
        ("raw/test.parquet", "'user'", "string values", "training rows hold integer"),
        rewrite("test", with_column("user", lambda table: table["city"])),
    ),
    BadInput(
        "label outside 0 and 1",
        ("raw/valid.parquet", "row group 0", "'click'", "row 7", "holds 2", "expected 0 or 1"),
        rewrite("valid", with_label_two),
    ),
    BadInput(
        "empty split",
        ("split `valid` is empty", "raw/valid.parquet", "data.valid"),
        rewrite("valid", lambda table: table.slice(0, 0)),
    ),
    BadInput(
        "truncated Parquet",
        ("raw/test.parquet", "cannot be read", "truncated"),
        truncate("test"),
    ),
    BadInput(
        "no such file", ("no file matches", "nowhere.parquet"), overrides=("data.train=nowhere.parquet",)
    ),
    BadInput(
        "unknown key",
        ("train.batchsize", "unknown key", "did you mean `batch_size`"),
        overrides=("train.batchsize=10",),
    ),
    BadInput("wrong type of a value", ("train.batch_size", "'many'"), overrides=("train.batch_size=many",)),
    BadInput("not an override", ("'max_steps'", "key=value"), overrides=("max_steps",)),
    BadInput(
        "fewer rows than shares",
        ("train", "60 row(s) cannot be shared by 80 lanes"),
        overrides=("data.lanes=80", "train.batch_size=80"),
    ),
    BadInput(
        "batch size not divisible",
        ("train.batch_size: 10", "`data.lanes: 3`"),
        overrides=("data.lanes=3",),
    ),
    BadInput(
        "cuda without CUDA",
        ("distributed.device: cuda", "no CUDA device"),
        overrides=("distributed.device=cuda",),
    ),
    BadInput(
        "adam on CPU",
        ("train.table_optimizer: adam", "no CPU kernel", "rowwise_adagrad"),
        overrides=("train.table_optimizer=adam",),
    ),
    BadInput(
        "sharding that the device lacks",
        ("distributed.tables.user.kernel", "fused_uvm", "cpu"),
        overrides=("distributed.tables={user: {kernel: fused_uvm}}",),
    ),
    BadInput("finetune before pretrain", ("holds no checkpoint", "run `pretrain`"), verb="finetune"),
    BadInput("evaluate before training", ("no trained click stage", "run `finetune`"), verb="evaluate"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_named_and_leaves_nothing_half_written(case: BadInput, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    write_raw(tmp_path)
    case.damage(tmp_path)
    before = files_below(tmp_path)
    assert run(tmp_path, values_of(tmp_path), case.verb, *case.overrides) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    for part in case.says:
        assert part in error
    assert "Traceback" not in error
    new = files_below(tmp_path).keys() - before.keys() - {"config.yaml"}
    made = {path for path in new if not path.endswith(".lock")}
    # Raw data that are sound are prepared, wholly; a stage has not begun.
    assert not [path for path in made if not path.startswith("prepared/")]
    if made:
        assert "prepared/manifest.json" in made


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    write_raw(directory)
    assert run(directory, values_of(directory), "pretrain") == 0
    assert run(directory, values_of(directory), "scratch") == 0
    return directory


@dataclass(frozen=True)
class LateError:
    name: str
    says: tuple[str, ...]
    verb: str = "scratch"
    arguments: tuple[str, ...] = field(default=())


LATE = (
    LateError(
        "planning fails",
        ("host_memory_gb", "no sharding plan"),
        arguments=("--fresh", "distributed.host_memory_gb=1.0e-9"),
    ),
    LateError(
        "optimizer without a kernel", ("no CPU kernel",), arguments=("--fresh", "train.table_optimizer=lamb")
    ),
    LateError(
        "checkpoint of another width",
        ("checkpoint of another schema", "table user", "of 8 there", "of 12 here"),
        "finetune",
        ("model.dim=12",),
    ),
    LateError(
        "checkpoint of another network",
        ("does not fit this model", "model section"),
        "evaluate",
        ("model.denoiser.num_layers=2",),
    ),
    LateError("no checkpoint there", ("no complete checkpoint",), "evaluate", ("--checkpoint", "nowhere")),
)


@pytest.mark.parametrize("case", LATE, ids=lambda case: case.name)
def test_a_failure_before_the_first_step_keeps_earlier_results(case: LateError, trained, capsys):
    before = files_below(trained)
    assert run(trained, values_of(trained), case.verb, *case.arguments) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    for part in case.says:
        assert part in error
    after = {path: digest for path, digest in files_below(trained).items() if not path.endswith(".lock")}
    assert after == {path: digest for path, digest in before.items() if not path.endswith(".lock")}


def test_checkpoint_of_another_schema_is_refused(trained, tmp_path, capsys):
    values = values_of(trained)
    values["features"]["fields"][1] = {"name": "city", "kind": "id", "min_count": 40}
    values["data"]["prepared_dir"] = str(tmp_path / "prepared")
    config = write_config(tmp_path, values)
    assert main(["evaluate", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert "checkpoint of another schema" in error
    assert "table city" in error
