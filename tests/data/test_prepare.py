import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from alone import Alone
from raw_log import FEATURES, World, config_for, encoded, raw_table, rows

from hetegen_rec.config import ConfigError, RunConfig, Schema
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.prepare import prepare, read_statistics
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.locks import directory_lock

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def raw(tmp_path) -> Path:
    for split, sizes in {"train": (50, 0, 90), "valid": (30,), "test": (7, 11)}.items():
        (tmp_path / split).mkdir()
        for part, size in enumerate(sizes):
            path = tmp_path / split / f"part-{part}.parquet"
            pq.write_table(rows(size, seed=part), path, row_group_size=16)
    return tmp_path


def test_every_row_is_encoded_once_in_raw_order(raw) -> None:
    statistics = prepare(config_for(raw), Alone())
    for split, num_rows in {"train": 140, "valid": 30, "test": 18}.items():
        table = encoded(raw, split)
        assert table["__row_id"].to_pylist() == list(range(num_rows))
        assert table["__label"].to_pylist() == raw_table(raw, split)["y"].to_pylist()
    assert statistics.num_rows == 140
    assert statistics.num_positives == sum(raw_table(raw, "train")["y"].to_pylist())
    for name in ("item", "place", "price"):
        ids = encoded(raw, "train")[name].to_numpy()
        counts = np.bincount(ids, minlength=statistics.table_rows(name))
        assert counts.tolist() == statistics.fields[name].counts.tolist()


def test_equal_raw_values_get_equal_ids_in_all_splits(raw) -> None:
    prepare(config_for(raw), Alone())
    pairs = set()
    for split in ("train", "valid", "test"):
        users = zip(
            raw_table(raw, split)["user"].to_pylist(), encoded(raw, split)["user"].to_pylist(), strict=True
        )
        pairs.update((user, found) for user, found in users if found > 1)
    assert len(pairs) == len({user for user, _ in pairs}) == len({found for _, found in pairs})
    seen = raw_table(raw, "train")["user"].to_pylist()
    expected = [seen.count(user) for user in raw_table(raw, "valid")["user"].to_pylist()]
    assert encoded(raw, "valid")["__user_rows"].to_pylist() == expected


def test_row_groups_have_the_configured_size_and_files_a_bounded_number(raw, monkeypatch) -> None:
    monkeypatch.setattr("hetegen_rec.data.parts.GROUPS_PER_PART", 3)
    prepare(config_for(raw), Alone())
    parts = sorted((raw / "prepared" / "train").iterdir())
    assert [path.name for path in parts] == [f"part-00000-0000{i}.parquet" for i in range(3)]
    files = [pq.ParquetFile(path).metadata for path in parts]
    assert [f.row_group(i).num_rows for f in files for i in range(f.num_row_groups)] == [20] * 7


@pytest.mark.parametrize("size", [2, 3, 16])
def test_the_number_of_ranks_changes_nothing_but_the_files(raw, size) -> None:
    alone = prepare(config_for(raw), Alone())
    config = config_for(raw, prepared_dir=f"{raw}/many")
    results = World(size).run(lambda workers: prepare(config, workers))
    assert all(isinstance(result, Statistics) for result in results), results
    assert {result.fingerprint for result in results} == {alone.fingerprint}
    for split in ("train", "valid", "test"):
        assert encoded(raw, split, "many").equals(encoded(raw, split))
    assert not (raw / "many" / "counts").exists()


def test_a_second_run_writes_nothing_until_an_input_changes(raw) -> None:
    config = config_for(raw)
    prepare(config, Alone())
    path = raw / "prepared" / "manifest.json"
    written = path.stat().st_ino, path.stat().st_mtime_ns
    World(2).run(lambda workers: prepare(config, workers))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == written
    os.utime(raw / "test" / "part-0.parquet", ns=(1, 1))
    prepare(config, Alone())
    assert (path.stat().st_ino, path.stat().st_mtime_ns) != written


def test_what_an_older_version_wrote_is_prepared_anew(raw) -> None:
    config = config_for(raw)
    prepare(config, Alone())
    path = raw / "prepared" / "manifest.json"
    written = path.read_text()
    path.write_text(written.replace('"format_version": 3', '"format_version": 2'))
    prepare(config, Alone())
    assert path.read_text() == written


def test_model_side_keys_of_fields_need_no_new_preparation(raw) -> None:
    prepare(config_for(raw), Alone())
    fields = [{**FEATURES["fields"][0], "dim": 8, "reconstruct": False}, *FEATURES["fields"][1:]]
    assert read_statistics(config_for(raw, FEATURES | {"fields": fields})).num_rows == 140


def test_on_the_fly_writes_statistics_and_vocabularies_only(raw) -> None:
    config = config_for(raw, encode="on_the_fly")
    assert prepare(config, Alone()).num_rows == read_statistics(config).num_rows == 140
    names = {path.name for path in (raw / "prepared").iterdir()}
    assert names == {"manifest.json", "row_groups.parquet", "statistics.json", "arrays", "vocabulary"}
    with pytest.raises(DataError, match="no encoded rows of train, valid, test; run prepare again"):
        read_statistics(config_for(raw))


def test_csv_gives_the_encoded_rows_of_parquet_with_strings(raw) -> None:
    features = FEATURES | {"fields": [f for f in FEATURES["fields"] if f["name"] not in ("tags", "history")]}
    for split in ("train", "valid", "test"):
        for path in sorted((raw / split).glob("*.parquet")):
            table = pq.read_table(path).drop_columns(["tags", "history"])
            for name in ("item", "place"):
                index = table.column_names.index(name)
                table = table.set_column(index, name, table[name].cast(pa.string()))
            pq.write_table(table, path)
            pyarrow.csv.write_csv(table, path.with_suffix(".csv"))
    prepare(config_for(raw, features), Alone())
    paths = {split: f"{raw}/{split}/*.csv" for split in ("train", "valid", "test")}
    config = config_for(raw, features, prepared_dir=f"{raw}/from_csv", **paths)
    World(2).run(lambda workers: prepare(config, workers))
    for split in paths:
        assert encoded(raw, split, "from_csv").equals(encoded(raw, split))
    with pytest.raises(DataError, match=r"`data.encode: on_the_fly` needs Parquet"):
        prepare(config_for(raw, features, prepared_dir=f"{raw}/fly", encode="on_the_fly", **paths), Alone())


TIMES = {
    "int32": pa.int32(),
    "int64": pa.int64(),
    "date32": pa.date32(),
    "milliseconds": pa.timestamp("ms"),
    "milliseconds with a zone": pa.timestamp("ms", "UTC"),
    "microseconds": pa.timestamp("us"),
    "nothing": pa.null(),
}


def timed(raw: Path, older: str, newer: str) -> RunConfig:
    """Training rows with times as two types: those of the first file, and those of the others."""
    for split in ("train", "valid", "test"):
        for path in sorted((raw / split).iterdir()):
            table = pq.read_table(path)
            kind = TIMES[older if path == raw / "train" / "part-0.parquet" else newer]
            days = pa.array(range(len(table)), pa.int32())
            values = pa.nulls(len(table)) if pa.types.is_null(kind) else days
            if pa.types.is_timestamp(kind):
                values = days.cast(pa.date32())
            pq.write_table(table.append_column("at", values.cast(kind)), path)
    return config_for(raw, FEATURES | {"timestamp": "at"})


@pytest.mark.parametrize(
    ("older", "newer"),
    [("int32", "int64"), ("milliseconds", "milliseconds with a zone"), ("date32", "nothing")],
)
def test_times_of_one_unit_may_be_stored_as_several_types(raw, older, newer) -> None:
    assert prepare(timed(raw, older, newer), Alone()).num_rows == 140


@pytest.mark.parametrize(("older", "newer"), [("int64", "date32"), ("microseconds", "date32")])
def test_times_of_two_units_are_refused(raw, older, newer) -> None:
    units = r"train/part-0\.parquet stores \S+, .*train/part-2\.parquet stores timestamp\[s\]; write all"
    config = timed(raw, older, newer)
    results = World(2).run(lambda workers: prepare(config, workers))
    for result in results:
        with pytest.raises(DataError, match=units):
            raise result


def test_progress_counts_every_row_of_both_passes(raw) -> None:
    told: list[tuple[str, int, int]] = []
    prepare(config_for(raw), Alone(), lambda *step: told.append(step))
    last = {phase: (done, total) for phase, done, total in told}
    assert last == {
        "counting train": (140, 140),
        "encoding train": (140, 140),
        "encoding valid": (30, 30),
        "encoding test": (18, 18),
    }


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_file_of_train_and_another_split_is_refused(raw, split) -> None:
    (raw / "linked.parquet").symlink_to(raw / "train" / "part-2.parquet")
    config = config_for(raw, **{split: [f"{raw}/{split}/*.parquet", f"{raw}/linked.parquet"]})
    message = rf"linked\.parquet stands in `data\.train` and in `data\.{split}`; take it off one"
    with pytest.raises(DataError, match=message):
        prepare(config, Alone())
    assert not (raw / "prepared").exists()


def test_valid_and_test_may_be_the_same_rows(raw) -> None:
    prepare(config_for(raw, test=f"{raw}/valid/*.parquet"), Alone())
    assert encoded(raw, "test").equals(encoded(raw, "valid"))


def spoil_label(raw: Path) -> None:
    table = rows(20, 0)
    pq.write_table(table.set_column(0, "y", pa.array([0] * 19 + [2])), raw / "valid" / "part-0.parquet")


def spoil_type(raw: Path) -> None:
    table = rows(20, 0)
    strings = pa.array([str(i) for i in range(20)])
    pq.write_table(table.set_column(1, "item", strings), raw / "train" / "part-2.parquet")


def drop_column(raw: Path) -> None:
    pq.write_table(rows(20, 0).drop_columns(["price"]), raw / "test" / "part-1.parquet")


def truncate(raw: Path) -> None:
    path = raw / "train" / "part-2.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def empty_split(raw: Path) -> None:
    pq.write_table(rows(0, 0), raw / "valid" / "part-0.parquet")


def remove_split(raw: Path) -> None:
    (raw / "valid" / "part-0.parquet").unlink()


HOSTILE = [
    (spoil_label, r"valid/part-0.parquet, row group 0: .*'y': row 19 of the split holds 2, expected 0 or 1"),
    (
        spoil_type,
        r"part-2.parquet, row group 0: column 'item' .*string values, but .*part-0.* integer values",
    ),
    (drop_column, r"test/part-1.parquet: no column 'price' .*features.fields, `column` of 'price'"),
    (truncate, r"train/part-2.parquet: cannot be read; it may be truncated"),
    (empty_split, r"split `valid` is empty: no rows in .*valid/\*\.parquet"),
    (remove_split, r"no file matches .*valid/\*\.parquet"),
]


@pytest.mark.parametrize(("spoil", "message"), HOSTILE, ids=lambda value: getattr(value, "__name__", ""))
def test_bad_input_is_explained_and_leaves_what_was_there(raw, spoil, message) -> None:
    config = config_for(raw)
    prepare(config, Alone())
    before = (raw / "prepared" / "manifest.json").read_bytes()
    spoil(raw)
    with pytest.raises(DataError, match=message):
        prepare(config, Alone())
    assert (raw / "prepared" / "manifest.json").read_bytes() == before
    assert [path.name for path in raw.iterdir() if path.name.startswith(".")] == [".prepared.lock"]


@pytest.mark.parametrize("spoil", [spoil_label, spoil_type, truncate])
def test_a_failure_on_one_rank_ends_all_and_leaves_nothing(raw, spoil) -> None:
    spoil(raw)
    config = config_for(raw)
    results = World(3).run(lambda workers: prepare(config, workers))
    assert all(isinstance(result, Exception) for result in results)
    assert any(isinstance(result, DataError) for result in results)
    assert {path.name for path in raw.iterdir()} == {"train", "valid", "test", ".prepared.lock"}


def test_what_a_killed_run_left_does_not_leak_into_the_next(raw) -> None:
    (raw / ".prepared.partial" / "train").mkdir(parents=True)
    (raw / ".prepared.partial" / "train" / "part-99999-00000.parquet").write_bytes(b"half")
    prepare(config_for(raw), Alone())
    assert encoded(raw, "train").num_rows == 140


def test_a_job_waits_for_another_one_that_prepares_the_same(raw, monkeypatch, caplog) -> None:
    monkeypatch.setattr("hetegen_rec.data.prepare._SECONDS_BETWEEN_TRIES", 0.01)
    config = config_for(raw)
    results: list[Any] = []
    jobs = [
        threading.Thread(target=lambda: results.extend(World(2).run(lambda rank: prepare(config, rank))))
        for _ in range(2)
    ]
    with caplog.at_level("INFO"):
        with directory_lock(raw / "prepared"):
            for job in jobs:
                job.start()
            while caplog.text.count("waiting for another job") < 2:
                assert all(job.is_alive() for job in jobs)
                time.sleep(0.01)
            assert not (raw / "prepared").exists()
        for job in jobs:
            job.join(30)
    assert f"in use by process {os.getpid()} on" in caplog.text
    assert caplog.text.count("counting train:") == 1
    assert [result.num_rows for result in results] == [140] * 4


@pytest.mark.parametrize("prepared_before", [True, False])
def test_a_link_to_another_disk_stays_one(raw, prepared_before) -> None:
    (raw / "disk").mkdir()
    if prepared_before:
        prepare(config_for(raw, prepared_dir=f"{raw}/disk/there", encode="on_the_fly"), Alone())
    (raw / "prepared").symlink_to(raw / "disk" / "there")
    prepare(config_for(raw), Alone())
    assert (raw / "prepared").readlink() == raw / "disk" / "there"
    assert encoded(raw, "train", "disk/there").num_rows == 140
    assert {path.name for path in (raw / "disk").iterdir()} == {"there", ".there.lock"}


def test_a_directory_that_prepare_did_not_write_is_not_replaced(raw) -> None:
    (raw / "prepared").mkdir()
    (raw / "prepared" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="was not written by prepare"):
        prepare(config_for(raw), Alone())
    assert (raw / "prepared" / "thesis.tex").exists()


def test_statistics_of_unprepared_or_otherwise_prepared_data_are_refused(raw) -> None:
    with pytest.raises(DataError, match="run prepare first"):
        read_statistics(config_for(raw))
    prepare(config_for(raw), Alone())
    with pytest.raises(DataError, match="prepared for another schema than `features`; run prepare again"):
        read_statistics(config_for(raw, FEATURES | {"fields": FEATURES["fields"][:3]}))


def test_context_columns_own_their_prefix() -> None:
    field = {"name": "__label", "kind": "id"}
    with pytest.raises(ValueError, match="must not start with `__`"):
        Schema.model_validate({"label": "y", "fields": [field]})
    with pytest.raises(ConfigError, match="must not start with `__`"):
        config_for(Path("x"), {"label": "y", "fields": [field]})


def real_config(name: str, tmp_path: Path, features: dict) -> RunConfig:
    root = SHARED / name
    if not root.exists():
        pytest.skip(f"the shared data set {name} is not here")
    return config_for(root, features, prepared_dir=f"{tmp_path}/prepared", rows_per_group=4096)


def test_criteo_with_its_nulls(tmp_path) -> None:
    fields = [
        {"name": "I1", "kind": "numeric"},
        {"name": "I5", "kind": "numeric"},
        {"name": "C3", "kind": "categorical", "min_count": 5},
        {"name": "C20", "kind": "categorical", "vocabulary": "hash", "hash_size": 100},
    ]
    config = real_config("criteo_10k", tmp_path, {"label": "label", "fields": fields})
    statistics = prepare(config, Alone())
    raw, table = raw_table(SHARED / "criteo_10k", "train"), encoded(tmp_path, "train")
    for field in statistics.fields.values():
        assert field.num_missing == raw[field.name].null_count == (table[field.name].to_numpy() == 0).sum()
    assert statistics.table_rows("I5") == 34
    assert statistics.fields["C20"].cardinality == 3


def test_movielens_with_histories_and_cold_users(tmp_path) -> None:
    fields = [
        {"name": "item_id", "kind": "id"},
        {"name": "user_id", "kind": "id"},
        {"name": "genres", "kind": "multi_valued", "max_length": 6},
        {"name": "hist_item_ids", "kind": "sequence", "table": "item_id", "max_length": 10},
    ]
    features = {"label": "label", "user": "user_id", "timestamp": "timestamp", "fields": fields}
    config = real_config("movielens_100k", tmp_path, features)
    statistics = prepare(config, Alone())
    raw, table = raw_table(SHARED / "movielens_100k", "train"), encoded(tmp_path, "train")
    id_of = dict(zip(raw["item_id"].to_pylist(), table["item_id"].to_pylist(), strict=True))
    history = raw["hist_item_ids"][5000].as_py()
    found = table["hist_item_ids"][5000].as_py()
    assert found == [id_of[item] for item in reversed(history[-10:])]
    assert statistics.fields["genres"].num_out_of_vocabulary == 0
    cold = (encoded(tmp_path, "test")["__user_rows"].to_numpy() == 0).mean()
    assert cold > 0.8
