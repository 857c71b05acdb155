from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from alone import Alone
from raw_log import FEATURES, World, config_for, encoded, rows

from hetegen_rec.config import ConfigError, RunConfig
from hetegen_rec.config.schema import NUM_RESERVED_IDS
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.prepare import prepare
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.data.vocabulary import ExactVocabulary

EXACT = ("item", "user", "tags")


def write_rows(root: Path, month: int) -> None:
    """Rows of a month; every month has some users that the one before had not."""
    for split, size in {"train": 150, "valid": 30, "test": 20}.items():
        (root / split).mkdir(parents=True)
        table = rows(size, seed=month)
        users = [f"user {int(user.split()[1]) + 5 * month}" for user in table["user"].to_pylist()]
        table = table.set_column(table.column_names.index("user"), "user", pa.array(users))
        pq.write_table(table, root / split / "part.parquet", row_group_size=16)


@pytest.fixture
def older(tmp_path) -> Statistics:
    """Prepared data of the past month, and the raw data of this one."""
    write_rows(tmp_path / "may", month=1)
    write_rows(tmp_path / "june", month=2)
    return prepare(config_for(tmp_path / "may"), Alone())


def june(root: Path, features: dict[str, Any] = FEATURES, **data: Any) -> RunConfig:
    return config_for(root / "june", features, **{"keep_ids_of": f"{root}/may/prepared", **data})


def field_replaced(replaced: str, /, **values: Any) -> dict[str, Any]:
    fields = [{**field, **values} if field["name"] == replaced else field for field in FEATURES["fields"]]
    return FEATURES | {"fields": fields}


def vocabulary(root: Path, month: str, table: str) -> ExactVocabulary:
    return ExactVocabulary.load(root / month / "prepared" / "vocabulary" / f"{table}.parquet")


def test_newer_data_keep_every_id_and_add_their_own(tmp_path, older) -> None:
    newer = prepare(june(tmp_path), Alone())
    for table in EXACT:
        old, new = vocabulary(tmp_path, "may", table), vocabulary(tmp_path, "june", table)
        kept = old.values.slice(0, old.num_kept)
        assert new.values.slice(0, old.num_kept).equals(kept)
        assert new.num_kept >= old.num_kept
    assert newer.table_rows("user") > older.table_rows("user")
    assert newer.table_identities["user"].grown_from(older.table_identities["user"])
    for table in ("price", "place"):
        assert newer.table_identities[table] == older.table_identities[table]
    assert newer.fields["price"].bucket_edges.tolist() == older.fields["price"].bucket_edges.tolist()
    assert newer.num_rows == 150
    table = encoded(tmp_path / "june", "train")
    for name in ("item", "user", "price", "place"):
        ids = pa.chunked_array([table[name]]).value_counts().to_pylist()
        counts = newer.fields[name].counts
        assert {entry["values"]: entry["counts"] for entry in ids} == {
            id_: count for id_, count in enumerate(counts.tolist()) if count
        }


def test_a_third_preparation_descends_from_the_first(tmp_path, older) -> None:
    prepare(june(tmp_path), Alone())
    write_rows(tmp_path / "july", month=3)
    by_itself = prepare(config_for(tmp_path / "july"), Alone())
    third = prepare(config_for(tmp_path / "july", keep_ids_of=f"{tmp_path}/june/prepared"), Alone())
    assert third.table_identities["user"].grown_from(older.table_identities["user"])
    assert not by_itself.table_identities["user"].grown_from(older.table_identities["user"])


def test_kept_ids_are_the_same_on_any_number_of_ranks(tmp_path, older) -> None:
    alone = prepare(june(tmp_path), Alone())
    config = june(tmp_path, prepared_dir=f"{tmp_path}/june/many")
    results = World(3).run(lambda workers: prepare(config, workers))
    assert all(isinstance(result, Statistics) for result in results), results
    assert {result.fingerprint for result in results} == {alone.fingerprint}
    for split in ("train", "valid", "test"):
        assert encoded(tmp_path / "june", split, "many").equals(encoded(tmp_path / "june", split))


def test_other_older_ids_make_newer_data_stale(tmp_path, older) -> None:
    path = tmp_path / "june" / "prepared" / "manifest.json"

    def written(config: RunConfig) -> int:
        prepare(config, Alone())
        return path.stat().st_mtime_ns

    first = written(june(tmp_path))
    assert written(june(tmp_path)) == first
    pq.write_table(rows(160, seed=9), tmp_path / "may" / "train" / "part.parquet")
    prepare(config_for(tmp_path / "may"), Alone())
    second = written(june(tmp_path))
    assert second != first
    assert written(june(tmp_path, keep_ids_of=None)) != second


def test_an_unseen_value_counts_nothing_and_a_rare_one_may_get_an_id_later(tmp_path) -> None:
    for month, items in {"may": [3, 3, 8], "june": [8, 8, 1, 1, 1]}.items():
        write_rows(tmp_path / month, month=1)
        table = rows(len(items), seed=1).drop_columns("history")
        table = table.set_column(1, "item", pa.array(items))
        history = pa.array([[]] * len(items), pa.list_(pa.int64()))
        pq.write_table(table.append_column("history", history), tmp_path / month / "train" / "part.parquet")
    prepare(config_for(tmp_path / "may"), Alone())
    newer = prepare(june(tmp_path), Alone())
    assert vocabulary(tmp_path, "june", "item").values.to_pylist() == [3, 1, 8]
    assert newer.fields["item"].counts.tolist() == [0, 0, 0, 3, 2]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            field_replaced("place", hash_size=21),
            r"field 'place': vocabulary hash, hash_size 20 there, .*hash_size 21",
        ),
        (field_replaced("price", num_buckets=5), r"field 'price': .*num_buckets 4 there, .*num_buckets 5"),
        (
            field_replaced("user", vocabulary="hash", hash_size=9),
            r"field 'user': vocabulary vocab there, vocabulary hash",
        ),
        (field_replaced("tags", name="labels", column="tags"), r"field 'labels': absent there.*field 'tags'"),
    ],
    ids=["hash size", "buckets", "kind of vocabulary", "another field"],
)
def test_fields_that_make_other_ids_are_refused_by_name(tmp_path, older, features, message) -> None:
    with pytest.raises(DataError, match=message):
        prepare(june(tmp_path, features), Alone())
    assert not (tmp_path / "june" / "prepared").exists()


def test_another_threshold_or_dimension_keeps_ids_all_the_same(tmp_path, older) -> None:
    newer = prepare(june(tmp_path, field_replaced("item", min_count=5, dim=8)), Alone())
    kept = vocabulary(tmp_path, "may", "item").num_kept
    assert newer.table_rows("item") >= NUM_RESERVED_IDS + kept


def test_values_of_another_type_are_refused_by_name(tmp_path, older) -> None:
    for path in (tmp_path / "june").glob("*/part.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.set_column(2, "user", pa.array(range(len(table)))), path)
    with pytest.raises(DataError, match=r"'user' holds integer values, but .*may/prepared.* string values"):
        prepare(june(tmp_path), Alone())


def test_older_data_that_are_absent_damaged_or_the_newer_ones_are_refused(tmp_path, older) -> None:
    with pytest.raises(ConfigError, match=r"keep_ids_of: .* is `prepared_dir` itself"):
        june(tmp_path, keep_ids_of=f"{tmp_path}/june/prepared/")
    with pytest.raises(DataError, match=r"nowhere: holds no prepared data"):
        prepare(june(tmp_path, keep_ids_of=f"{tmp_path}/nowhere"), Alone())
    (tmp_path / "may" / "prepared" / "vocabulary" / "user.parquet").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"user.parquet: cannot be read .*prepare the data of"):
        prepare(june(tmp_path), Alone())
