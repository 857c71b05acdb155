import logging
import subprocess
import sys
import zipfile
from collections import defaultdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetegen_rec.config.data import SourceConfig
from hetegen_rec.data.sources import SourceError, fetch_source, movielens

USERS = b"""user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token
1\t24\tM\ttechnician\t85711
2\t53\tF\tother\tT8H1N
"""
ITEMS = b"""item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
10\t"Quoted" Story\t1995\tAnimation Children's Comedy
20\tunkonwn\tunkonwn\tunknown
30\tLand Before Time III\tV\tDrama
"""
COLUMNS = {
    "label": pa.int8(),
    "user_id": pa.int64(),
    "item_id": pa.int64(),
    "timestamp": pa.int64(),
    "age": pa.int32(),
    "gender": pa.string(),
    "occupation": pa.string(),
    "zip_prefix": pa.string(),
    "release_year": pa.int32(),
    "genres": pa.list_(pa.string()),
    "hist_item_ids": pa.list_(pa.int64()),
    "user_prior_events": pa.int64(),
    "user_prior_likes": pa.int64(),
    "item_prior_events": pa.int64(),
    "item_prior_likes": pa.int64(),
}


def click_log(*events):
    """The log of (user, item, rating, time) tuples."""
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += ["\t".join(map(str, event)) for event in events]
    return movielens.click_log("\n".join(lines).encode(), USERS, ITEMS)


def test_columns_and_types():
    table = click_log((1, 10, 5, 100))
    assert dict(zip(table.column_names, table.schema.types, strict=True)) == COLUMNS


def test_label_is_a_rating_of_four_or_five_and_threes_are_dropped():
    table = click_log(*[(1, 10, rating, 100 + rating) for rating in (1, 2, 3, 4, 5)])
    assert table["label"].to_pylist() == [0, 0, 1, 1]


def test_attributes_are_joined_and_what_is_no_year_is_missing():
    rows = click_log((1, 10, 5, 1), (2, 20, 5, 2), (2, 30, 5, 3)).to_pylist()
    assert [row["release_year"] for row in rows] == [1995, None, None]
    assert rows[0]["genres"] == ["Animation", "Children's", "Comedy"]
    assert (rows[0]["age"], rows[0]["gender"], rows[0]["occupation"]) == (24, "M", "technician")
    assert [row["zip_prefix"] for row in rows] == ["857", "T8H", "T8H"]


def test_rows_stand_in_order_of_time_then_user_then_item():
    table = click_log((2, 10, 5, 7), (1, 30, 5, 7), (1, 20, 5, 7), (2, 20, 1, 3))
    order = list(zip(*(table[name].to_pylist() for name in ("timestamp", "user_id", "item_id")), strict=True))
    assert order == [(3, 2, 20), (7, 1, 20), (7, 1, 30), (7, 2, 10)]


def test_events_of_the_same_second_do_not_see_each_other():
    rows = click_log((1, 10, 5, 1), (1, 20, 5, 2), (1, 30, 5, 2), (1, 10, 1, 3)).to_pylist()
    assert [row["hist_item_ids"] for row in rows] == [[], [10], [10], [10, 20, 30]]
    assert [row["user_prior_events"] for row in rows] == [0, 1, 1, 3]


def test_threes_count_as_events_but_neither_as_likes_nor_as_history():
    *_, last = click_log((1, 10, 3, 1), (2, 10, 3, 1), (1, 10, 5, 2)).to_pylist()
    assert (last["user_prior_events"], last["user_prior_likes"]) == (1, 0)
    assert (last["item_prior_events"], last["item_prior_likes"]) == (2, 0)
    assert last["hist_item_ids"] == []


def test_history_keeps_the_most_recent_items_oldest_first():
    events = [(1, (10, 20, 30)[time % 3], 5, time) for time in range(60)]
    *_, last = click_log(*events).to_pylist()
    assert last["hist_item_ids"] == [event[1] for event in events[9:59]]
    assert last["user_prior_likes"] == 59


EVENTS = st.tuples(
    st.sampled_from([1, 2]), st.sampled_from([10, 20, 30]), st.integers(1, 5), st.integers(0, 12)
)


@given(st.lists(EVENTS, min_size=1, max_size=40))
def test_counts_and_histories_match_a_walk_through_time(events):
    expected = []
    past = defaultdict(list)
    for user, item, rating, time in sorted(events, key=lambda event: (event[3], event[0], event[1])):
        earlier = {key: [old for old in past[key] if old[2] < time] for key in (("u", user), ("i", item))}
        likes = {key: [old[0] for old in rows if old[1] >= 4] for key, rows in earlier.items()}
        counts = [len(rows) for key in earlier for rows in (earlier[key], likes[key])]
        if rating != 3:
            expected.append((user, item, counts, likes["u", user]))
        for key in earlier:
            past[key].append((item, rating, time))
    names = ("user_prior_events", "user_prior_likes", "item_prior_events", "item_prior_likes")
    found = [
        (row["user_id"], row["item_id"], [row[name] for name in names], row["hist_item_ids"])
        for row in click_log(*events).to_pylist()
    ]
    # Several ratings of one item by one user in one second have no order among them.
    assert sorted(found) == sorted(expected)


def test_a_member_of_another_checksum_is_refused(tmp_path):
    wheel = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("ml-100k.inter", "ml-100k.item", "ml-100k.user"):
            archive.writestr(f"recbole/dataset_example/ml-100k/{name}", "other data")
    with pytest.raises(SourceError, match=r"ml-100k\.inter has SHA-256 .* expected 4edb74e2"):
        movielens.read_members(wheel)


@pytest.mark.parametrize("content", [b"not a zip file", b"PK\x05\x06" + bytes(18)])
def test_a_broken_wheel_or_one_without_the_data_is_refused(tmp_path, content):
    wheel = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    wheel.write_bytes(content)
    with pytest.raises(SourceError, match=r"recbole-1\.2\.1.*cannot be read"):
        movielens.read_members(wheel)


def test_an_index_out_of_reach_is_explained_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(
        SourceError, match=r"(?s)recbole==1\.2\.1.*could not be downloaded.*pip said:\n.*ERROR"
    ):
        fetch_source(SourceConfig(name="movielens-100k"), tmp_path / "data" / "raw")
    assert list((tmp_path / "data").iterdir()) == []


def test_an_index_that_does_not_answer_is_explained(tmp_path, monkeypatch):
    def hang(command, **options):
        assert command[0] == sys.executable
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(SourceError, match="no answer within 300 seconds"):
        movielens.download_wheel(tmp_path)


def read(directory, split):
    return pq.read_table(directory / split).replace_schema_metadata()


def test_equals_the_reference_row_by_row(tmp_path, caplog, pytestconfig):
    reference = pytestconfig.rootpath.parent / "shared" / "data" / "movielens_100k"
    if not reference.is_dir():
        pytest.skip(f"no reference data in {reference}")
    try:
        movielens.download_wheel(tmp_path)
    except SourceError as error:
        pytest.skip(f"the package index does not serve the data: {error}")
    with caplog.at_level(logging.WARNING):
        fetch_source(SourceConfig(name="movielens-100k"), tmp_path / "raw")
    assert "GroupLens" in caplog.text
    assert "GroupLens" in (tmp_path / "raw" / "LICENSE-NOTICE.txt").read_text()
    for split, num_shards in [("train", 4), ("valid", 1), ("test", 1)]:
        assert read(tmp_path / "raw", split).equals(read(reference, split))
        shards = sorted((tmp_path / "raw" / split).iterdir())
        assert len(shards) == num_shards
        assert all(pq.read_metadata(shard).row_group(0).num_rows == 4096 for shard in shards)
