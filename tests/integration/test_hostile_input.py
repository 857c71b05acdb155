"""Hostile raw files: one clear line that names the place, or left out without a trace."""

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from alone import Alone
from multirank import run_ranks
from tiny_run import write_config

from hetegen_rec.cli import main
from hetegen_rec.config.loading import parse_config
from hetegen_rec.config.run import RunConfig
from hetegen_rec.data.manifest import read_manifest
from hetegen_rec.data.prepare import encode_files, prepare, read_statistics
from hetegen_rec.data.raw import DataError
from hetegen_rec.distributed.runtime import start_runtime

FILES = ("train/a", "train/b", "train/c", "valid/a", "valid/b", "test/a", "test/b")
ROWS_PER_GROUP = 10
GROUPS_PER_FILE = 2
ROWS_PER_FILE = ROWS_PER_GROUP * GROUPS_PER_FILE
SPLITS = ("train", "valid", "test")


def log(num_rows: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    lists = [rng.integers(0, 9, n).tolist() for n in rng.integers(0, 5, num_rows)]
    return pa.table(
        {
            "click": rng.integers(0, 2, num_rows),
            "time": rng.integers(0, 10**9, num_rows),
            "user": [f"user {i}" for i in rng.integers(0, 9, num_rows)],
            "item": rng.integers(0, 9, num_rows),
            "price": rng.normal(size=num_rows),
            "tags": pa.array([[f"tag {i}" for i in values] for values in lists], pa.list_(pa.string())),
            "history": pa.array(lists, pa.list_(pa.int64())),
        }
    )


def values_of(root: Path, **data: Any) -> dict[str, Any]:
    paths = {split: f"{root}/{split}/*.parquet" for split in SPLITS}
    return {
        "name": "hostile",
        "run_dir": str(root / "run"),
        "data": {**paths, "prepared_dir": str(root / "prepared"), **data},
        "features": {
            "label": "click",
            "timestamp": "time",
            "user": "user",
            "item": "item",
            "fields": [
                {"name": "user", "kind": "id"},
                {"name": "item", "kind": "id"},
                {"name": "price", "kind": "numeric", "num_buckets": 4},
                {"name": "tags", "kind": "multi_valued", "max_length": 3},
                {"name": "history", "kind": "sequence", "table": "item", "max_length": 3},
            ],
        },
    }


def config_of(root: Path, **data: Any) -> RunConfig:
    return parse_config(values_of(root, **data), "test")


def path_of(root: Path, name: str) -> Path:
    return root / f"{name}.parquet"


def write(path: Path, table: pa.Table, row_group_size: int = ROWS_PER_GROUP) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size, write_page_checksum=True)


def write_raw(root: Path) -> None:
    for seed, name in enumerate(FILES):
        write(path_of(root, name), log(ROWS_PER_FILE, seed))


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, [values])


Damage = Callable[[Path], None]
"""Does something to one raw file."""


def rewritten(change: Callable[[pa.Table], pa.Table]) -> Damage:
    return lambda path: write(path, change(pq.read_table(path)))


def with_value(column: str, value: Any) -> Damage:
    """The value stands in row 13, that is in the second row group."""

    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[13] = value
        return with_column(table, column, pa.array(values))

    return rewritten(change)


def stored_as(column: str, kind: pa.DataType) -> Damage:
    return rewritten(lambda table: with_column(table, column, table[column].combine_chunks().cast(kind)))


def not_utf8(table: pa.Table) -> pa.Table:
    values = table["user"].cast(pa.binary()).to_pylist()
    values[13] = b"caf\xe9"
    array = pa.array(values, pa.binary())
    return with_column(table, "user", pa.Array.from_buffers(pa.string(), len(array), array.buffers()))


def flip_a_bit(path: Path) -> None:
    """In the last value of a column of the second row group."""
    chunk = pq.read_metadata(path).row_group(1).column(3)
    content = bytearray(path.read_bytes())
    content[chunk.dictionary_page_offset + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def with_item_twice(table: pa.Table) -> pa.Table:
    return table.append_column("item", table["price"])


def huge_times(table: pa.Table) -> pa.Table:
    return with_column(table, "time", pa.array([2**64 - 1] * len(table), pa.uint64()))


@dataclass(frozen=True)
class Hostile:
    """A raw file of which some rows cannot be used."""

    name: str
    file: str
    damage: Damage
    says: tuple[str, ...]
    """What the error holds, besides the file's name."""
    bad_groups: tuple[int, ...] = (0, 1)
    """Row groups that have to be left out."""
    rows_known: bool = True
    """Whether the file's rows can be counted, so that those of later files keep their index."""

    @property
    def split(self) -> str:
        return self.file.split("/")[0]

    @property
    def whole_file(self) -> bool:
        """Whether it is no matter of row groups."""
        return "row group" not in "".join(self.says) and len(self.bad_groups) == GROUPS_PER_FILE


HOSTILE = (
    Hostile(
        "file of no bytes",
        "train/b",
        lambda path: path.write_bytes(b""),
        ("cannot be read",),
        rows_known=False,
    ),
    Hostile("truncated file", "train/a", cut_off, ("cannot be read", "truncated"), rows_known=False),
    Hostile(
        "file of another format",
        "valid/a",
        lambda path: path.write_text("a,b\n" * 99),
        ("cannot be read", "of another format"),
        rows_known=False,
    ),
    Hostile("dangling link", "train/c", make_dangling, ("is gone",), rows_known=False),
    Hostile("pipe", "train/c", make_pipe, ("is no file",), rows_known=False),
    Hostile("damaged page", "train/b", flip_a_bit, ("row group 1", "cannot be read"), (1,)),
    Hostile("damaged page of another split", "test/a", flip_a_bit, ("row group 1", "cannot be read"), (1,)),
    Hostile(
        "column that is not there",
        "train/b",
        rewritten(lambda table: table.drop_columns("item")),
        ("no column 'item'",),
    ),
    Hostile("column that is there twice", "train/c", rewritten(with_item_twice), ("2 columns 'item'",)),
    Hostile(
        "strings where others hold integers",
        "train/a",
        stored_as("item", pa.string()),
        ("row group 0", "'item'", "string values", "integer values"),
    ),
    Hostile(
        "integers where the training rows hold strings",
        "valid/a",
        rewritten(lambda table: with_column(table, "user", table["item"].combine_chunks())),
        ("row group 0", "'user'", "integer values", "string values"),
    ),
    Hostile(
        "label that is NaN",
        "train/b",
        with_value("click", float("nan")),
        ("row group 1", "'click'", "row 33 ", "nan"),
        (1,),
    ),
    Hostile(
        "label that is null",
        "valid/a",
        with_value("click", None),
        ("row group 1", "'click'", "row 13 ", "None"),
        (1,),
    ),
    Hostile(
        "label that is out of range",
        "test/a",
        with_value("click", 2),
        ("row group 1", "'click'", "row 13 ", "holds 2"),
        (1,),
    ),
    Hostile(
        "id that is out of range",
        "train/c",
        with_value("item", 1e30),
        ("row group 1", "'item'", "row 53 ", "1e+30", "64 bits"),
        (1,),
    ),
    Hostile(
        "id that is infinite",
        "train/c",
        with_value("item", float("inf")),
        ("row group 1", "'item'", "row 53 ", "inf"),
        (1,),
    ),
    Hostile(
        "time that is out of range",
        "train/b",
        rewritten(huge_times),
        ("row group ", "'time'", "not in range"),
    ),
    Hostile(
        "string that is not UTF-8",
        "train/b",
        rewritten(not_utf8),
        ("row group 1", "'user'", "row 33 ", "caf", "UTF-8"),
        (1,),
    ),
)


def stop_and_skip(roots: list[Path]) -> list[str]:
    """What a rank is told of each case where it has to stop; then each is prepared without its bad rows."""
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        told = []
        for root in roots:
            with pytest.raises(Exception) as error:  # noqa: PT011 - the peers of the failing rank raise theirs
                prepare(config_of(root, prepared_dir=f"{root}/on_two"), runtime)
            told.append(str(error.value))
            prepare(config_of(root, prepared_dir=f"{root}/on_two", on_bad_shard="skip"), runtime)
        return told


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The raw files of each case, by its name."""
    roots = {}
    for case in HOSTILE:
        roots[case.name] = root = tmp_path_factory.mktemp("hostile")
        write_raw(root)
        case.damage(path_of(root, case.file))
    return roots


@pytest.fixture(scope="module")
def told_on_two(damaged: dict[str, Path]) -> dict[str, tuple[str, ...]]:
    """What the two ranks of one job are told of each case."""
    told = run_ranks(2, stop_and_skip, list(damaged.values()))
    return dict(zip(damaged, zip(*told, strict=True), strict=True))


def encoded(prepared: Path, split: str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((prepared / split).glob("*.parquet")))


def write_usable(root: Path, case: Hostile) -> dict[str, list[int]]:
    """Writes raw files of just the rows that can be used; returns their indices in their splits."""
    indices: dict[str, list[int]] = {split: [] for split in SPLITS}
    first_row = dict.fromkeys(SPLITS, 0)
    for seed, name in enumerate(FILES):
        bad_groups = case.bad_groups if name == case.file else ()
        kept = [row for row in range(ROWS_PER_FILE) if row // ROWS_PER_GROUP not in bad_groups]
        split = name.split("/")[0]
        indices[split] += [first_row[split] + row for row in kept]
        first_row[split] += ROWS_PER_FILE if name != case.file or case.rows_known else 0
        write(path_of(root, name), log(ROWS_PER_FILE, seed).take(pa.array(kept, pa.int64())))
    return indices


def named(cases: Any) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@named(HOSTILE)
def test_hostile_file_stops_prepare_with_one_line_that_names_it(case: Hostile, damaged, tmp_path, capsys):
    root = damaged[case.name]
    config = write_config(tmp_path, values_of(root, prepared_dir=f"{root}/stopped"))
    assert main(["prepare", "--config", str(config)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert lines[0].endswith("or leave out such rows with `data.on_bad_shard: skip`")
    for part in (f"{case.file}.parquet", *case.says):
        assert part in lines[0]
    assert not (root / "stopped").exists()


@named(HOSTILE)
def test_hostile_file_stops_all_ranks(case: Hostile, told_on_two):
    for part in (f"{case.file}.parquet", *case.says):
        assert all(part in told for told in told_on_two[case.name])


@named(HOSTILE)
def test_skipped_rows_leave_no_trace_on_one_rank_or_two(case: Hostile, damaged, told_on_two, tmp_path):
    root = damaged[case.name]
    prepare(config_of(root, prepared_dir=f"{root}/on_one", on_bad_shard="skip"), Alone())
    indices = write_usable(tmp_path, case)
    expected = prepare(config_of(tmp_path), Alone())
    for prepared in (root / "on_one", root / "on_two"):
        found = read_statistics(config_of(root, prepared_dir=str(prepared)))
        assert found.fingerprint == expected.fingerprint
        for split in SPLITS:
            rows = encoded(prepared, split)
            assert rows["__row_id"].to_pylist() == indices[split]
            usable = encoded(tmp_path / "prepared", split)
            assert rows.drop_columns("__row_id").equals(usable.drop_columns("__row_id"))


@named(HOSTILE)
def test_skipped_rows_are_told_and_kept_in_the_manifest(
    case: Hostile, damaged, told_on_two, tmp_path, caplog
):
    root = damaged[case.name]
    with caplog.at_level("WARNING"):
        prepare(config_of(root, prepared_dir=f"{tmp_path}/prepared", on_bad_shard="skip"), Alone())
    skipped = json.loads((tmp_path / "prepared" / "manifest.json").read_text())["skipped"]
    path = str(path_of(root, case.file))
    places = [path] if case.whole_file else [f"{path}, row group {index}" for index in case.bad_groups]
    assert [shard["where"] for shard in skipped] == places
    num_rows = len(case.bad_groups) * ROWS_PER_GROUP if case.rows_known else None
    assert sum(shard["num_rows"] or 0 for shard in skipped) == (num_rows or 0)
    *lines, last = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(places)
    assert all(place in line for place, line in zip(places, lines, strict=True))
    assert f"{len(places)} bad shard(s) left out: {num_rows or 0} row(s)" in last
    assert json.loads((root / "on_two" / "manifest.json").read_text())["skipped"] == skipped


@dataclass(frozen=True)
class Harmless:
    """Something odd about a raw file that changes nothing in what is prepared."""

    name: str
    damage: Damage


def without_rows(path: Path) -> None:
    """More files, without rows: of the same columns, of untyped ones and of none."""
    empty = log(0)
    write(path.with_name("empty.parquet"), empty)
    untyped = [(name, pa.null()) for name in empty.column_names]
    write(path.with_name("untyped.parquet"), pa.schema(untyped).empty_table())
    write(path.with_name("bare.parquet"), pa.table({}))


def with_empty_groups(path: Path) -> None:
    table = pq.read_table(path)
    with pq.ParquetWriter(path, table.schema) as writer:
        for rows in (table.slice(0, 0), table.slice(0, 7), table.slice(0, 0), table.slice(7)):
            writer.write_table(rows)


def a_file_a_row(path: Path) -> None:
    table = pq.read_table(path)
    for row in range(len(table)):
        write(path.with_name(f"{path.stem}-{row:03d}.parquet"), table.slice(row, 1))
    path.unlink()


HARMLESS = (
    Harmless("narrower integers", stored_as("item", pa.int32())),
    Harmless("whole floating-point ids", stored_as("item", pa.float64())),
    Harmless("dictionary of strings", stored_as("user", pa.dictionary(pa.int32(), pa.string()))),
    Harmless("files without rows", without_rows),
    Harmless("row groups without rows", with_empty_groups),
    Harmless("a file a row", a_file_a_row),
)


@pytest.mark.parametrize("policy", ["stop", "skip"])
@named(HARMLESS)
def test_what_only_looks_odd_changes_nothing(case: Harmless, policy, tmp_path):
    write_raw(tmp_path)
    expected = prepare(config_of(tmp_path, prepared_dir=f"{tmp_path}/before"), Alone())
    case.damage(path_of(tmp_path, "train/b"))
    found = prepare(config_of(tmp_path, on_bad_shard=policy), Alone())
    assert found.fingerprint == expected.fingerprint
    assert encoded(tmp_path / "prepared", "train").equals(encoded(tmp_path / "before", "train"))
    assert not read_manifest(tmp_path / "prepared").skipped


def test_lists_of_a_million_values_are_cut_to_length(tmp_path):
    write_raw(tmp_path)
    path = path_of(tmp_path, "train/b")
    table = pq.read_table(path)
    tags, history = table["tags"].to_pylist(), table["history"].to_pylist()
    tags[3], history[3] = ["tag 1", "tag 2", "tag 3"], [1, 2, 3]
    write(path, with_column(with_column(table, "tags", pa.array(tags)), "history", pa.array(history)))
    expected = prepare(config_of(tmp_path, prepared_dir=f"{tmp_path}/before"), Alone())
    tags[3], history[3] = tags[3] + ["tag 4"] * 10**6, [4] * 10**6 + history[3]
    write(path, with_column(with_column(table, "tags", pa.array(tags)), "history", pa.array(history)))
    assert prepare(config_of(tmp_path), Alone()).fingerprint == expected.fingerprint
    assert encoded(tmp_path / "prepared", "train").equals(encoded(tmp_path / "before", "train"))


def test_hundreds_of_tiny_files_are_rows_like_others(tmp_path):
    write_raw(tmp_path)
    table = log(200)
    for row in range(len(table)):
        write(tmp_path / "many" / f"{row:03d}.parquet", table.slice(row, 1))
    write(tmp_path / "one" / "all.parquet", table)
    for name in ("many", "one"):
        prepare(
            config_of(tmp_path, train=f"{tmp_path}/{name}/*", prepared_dir=f"{tmp_path}/from_{name}"), Alone()
        )
    assert encoded(tmp_path / "from_many", "train").equals(encoded(tmp_path / "from_one", "train"))


def test_not_a_number_is_missing_and_infinities_are_the_outermost_numbers(tmp_path):
    write_raw(tmp_path)
    odd = [float("nan"), None, float("-inf"), float("inf")]
    prices = pa.array([*odd, *range(-8, 8)], pa.float64())
    for name in FILES:
        path = path_of(tmp_path, name)
        write(path, with_column(pq.read_table(path), "price", prices))
    prepare(config_of(tmp_path), Alone())
    ids = encoded(tmp_path / "prepared", "train")["price"].to_pylist()
    others = ids[4:ROWS_PER_FILE]
    assert ids[:4] == [0, 0, min(others), max(others)]


def test_rows_that_break_between_the_passes_leave_no_trace(tmp_path):
    write_raw(tmp_path)
    config = config_of(tmp_path, on_bad_shard="skip")
    phases: list[str] = []

    def lose_files(phase: str, done: int, total: int) -> None:
        path_of(tmp_path, "train/b").unlink(missing_ok=True)
        path_of(tmp_path, "valid/a").unlink(missing_ok=True)
        phases.append(phase)

    found = prepare(config, Alone(), lose_files)
    counting = "counting train", "encoding train"
    assert [phase for phase, _ in itertools.groupby(phases)] == [
        *counting,
        *counting,
        "encoding valid",
        "encoding test",
    ]
    assert [Path(shard.where).stem for shard in read_manifest(tmp_path / "prepared").skipped] == [
        "b",
        "b",
        "a",
        "a",
    ]
    prepared = encoded(tmp_path / "prepared", "train")
    assert prepared["__row_id"].to_pylist() == [*range(20), *range(40, 60)]
    expected = prepare(config_of(tmp_path, prepared_dir=f"{tmp_path}/after"), Alone())
    assert found.fingerprint == expected.fingerprint


def test_rows_that_break_between_the_passes_stop_prepare(tmp_path):
    write_raw(tmp_path)
    path = path_of(tmp_path, "valid/a")
    with pytest.raises(
        DataError, match=r"valid/a\.parquet, row group 0: is gone since the files were listed"
    ):
        prepare(config_of(tmp_path), Alone(), lambda *_: path.unlink(missing_ok=True))
    write(path, log(ROWS_PER_FILE), row_group_size=ROWS_PER_FILE)
    with pytest.raises(DataError, match=r"valid/a\.parquet, row group 0: holds 5 rows, but had 20 when"):
        prepare(config_of(tmp_path), Alone(), lambda *_: write(path, log(5)))


def test_of_csv_the_whole_file_is_left_out(tmp_path):
    for split in SPLITS:
        (tmp_path / split).mkdir()
        for part in range(3):
            lines = [f"{row % 2},{row},user {row},{row},1.5,a|b,1|2" for row in range(20)]
            content = "\n".join(["click,time,user,item,price,tags,history", *lines])
            (tmp_path / split / f"{part}.csv").write_text(content)
    bad = tmp_path / "train" / "1.csv"
    bad.write_text(bad.read_text().replace("1,13,user 13", "0.5,13,user 13"))
    paths = {split: f"{tmp_path}/{split}/*.csv" for split in SPLITS}
    with pytest.raises(
        DataError, match=r"train/1\.csv: label column 'click': row 33 of the split holds 0\.5"
    ):
        prepare(config_of(tmp_path, **paths), Alone())
    prepare(config_of(tmp_path, **paths, on_bad_shard="skip"), Alone())
    (shard,) = read_manifest(tmp_path / "prepared").skipped
    assert (shard.where, shard.num_rows) == (str(bad), 20)
    assert encoded(tmp_path / "prepared", "train")["__row_id"].to_pylist() == [*range(20), *range(40, 60)]


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_of_bad_rows_alone_is_an_error(split, tmp_path):
    write_raw(tmp_path)
    for path in (tmp_path / split).iterdir():
        rewritten(lambda table: with_column(table, "click", pa.array([7] * ROWS_PER_FILE)))(path)
    with pytest.raises(
        DataError, match=rf"`{split}` is empty: .* in \d bad shard\(s\), the first being: .*holds 7"
    ):
        prepare(config_of(tmp_path, on_bad_shard="skip"), Alone())
    for path in (tmp_path / split).iterdir():
        cut_off(path)
    with pytest.raises(DataError, match=rf"`{split}` is empty: .* in \d bad shard\(s\), .*cannot be read"):
        prepare(config_of(tmp_path, on_bad_shard="skip"), Alone())


def test_the_policy_makes_data_stale_only_where_something_was_left_out(tmp_path):
    write_raw(tmp_path)
    manifest = tmp_path / "prepared" / "manifest.json"
    prepare(config_of(tmp_path), Alone())
    written = manifest.stat().st_mtime_ns
    for policy in ("skip", "stop"):
        prepare(config_of(tmp_path, on_bad_shard=policy), Alone())
        assert manifest.stat().st_mtime_ns == written
    cut_off(path_of(tmp_path, "train/b"))
    prepare(config_of(tmp_path, on_bad_shard="skip"), Alone())
    written = manifest.stat().st_mtime_ns
    prepare(config_of(tmp_path, on_bad_shard="skip"), Alone())
    assert manifest.stat().st_mtime_ns == written
    with pytest.raises(DataError, match=r"train/b\.parquet: cannot be read"):
        prepare(config_of(tmp_path), Alone())


def test_rows_to_be_scored_are_never_left_out(tmp_path):
    write_raw(tmp_path)
    config = config_of(tmp_path, on_bad_shard="skip")
    prepare(config, Alone())
    flip_a_bit(path_of(tmp_path, "test/a"))
    with pytest.raises(DataError, match=r"test/a\.parquet, row group 1: cannot be read"):
        encode_files(config, [f"{tmp_path}/test/*.parquet"], tmp_path / "encoded", Alone())


def train(config: str) -> int:
    return main(["scratch", "--config", config])


def test_a_stage_trains_on_the_fly_on_what_is_left(tmp_path):
    write_raw(tmp_path)
    flip_a_bit(path_of(tmp_path, "train/b"))
    flip_a_bit(path_of(tmp_path, "valid/a"))
    values = values_of(tmp_path, encode="on_the_fly", on_bad_shard="skip")
    values["model"] = {"dim": 8, "denoiser": {"num_layers": 1}, "ctr": {"hidden": [8]}}
    values["train"] = {"batch_size": 10, "eval_batch_size": 20, "tensorboard": False}
    values["stages"] = {"scratch": {"epochs": 1}}
    assert run_ranks(2, train, str(write_config(tmp_path, values))) == [0, 0]
    (shard,) = read_manifest(tmp_path / "prepared").skipped
    assert shard.where == f"{path_of(tmp_path, 'train/b')}, row group 1"
    scored = pq.read_table(tmp_path / "run" / "scratch" / "predictions" / "valid")["row_id"].to_pylist()
    assert sorted(scored) == [*range(10), *range(20, 40)]


def test_of_many_bad_shards_ten_are_told_one_by_one(tmp_path, caplog):
    write_raw(tmp_path)
    for number in range(14):
        (tmp_path / "train" / f"{number:02d}.parquet").write_bytes(b"")
    with caplog.at_level("WARNING"):
        prepare(config_of(tmp_path, on_bad_shard="skip"), Alone())
    *lines, more, last = [record.getMessage() for record in caplog.records]
    assert ["left out of `train`" in line for line in lines] == [True] * 10
    assert more.startswith("and 4 more bad shard(s)")
    assert last.endswith("14 bad shard(s) left out: 0 row(s) and 14 file(s) of unknown size")
