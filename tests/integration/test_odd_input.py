"""Raw input that only looks odd: what is prepared is what the same rows give in plain files."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from alone import Alone
from raw_files import (
    FILES,
    ROWS_PER_FILE,
    Damage,
    config_of,
    encoded,
    log,
    named,
    path_of,
    stored_as,
    with_column,
    write,
    write_raw,
)

from hetegen_rec.data.manifest import read_manifest
from hetegen_rec.data.prepare import prepare


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
