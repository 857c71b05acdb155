"""Hostile raw files: one clear line that names the place, or left out without a trace."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from alone import Alone
from multirank import run_ranks
from raw_files import (
    FILES,
    GROUPS_PER_FILE,
    ROWS_PER_FILE,
    ROWS_PER_GROUP,
    SPLITS,
    Damage,
    config_of,
    cut_off,
    encoded,
    flip_a_bit,
    huge_times,
    log,
    make_dangling,
    make_pipe,
    named,
    not_utf8,
    path_of,
    rewritten,
    stored_as,
    values_of,
    with_column,
    with_item_twice,
    with_value,
    write,
    write_raw,
)
from tiny_run import write_config

from hetegen_rec.cli import main
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.manifest import read_manifest
from hetegen_rec.data.prepare import encode_files, prepare, read_statistics
from hetegen_rec.distributed.runtime import start_runtime


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
        ("row group 1", "'item'", "row 53 ", "1e+30", "2**53"),
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
