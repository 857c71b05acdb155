"""From raw files over `prepare` to batches: prepared shards and raw rows encoded while reading."""

import os
import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from alone import Alone

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.loading import parse_config
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.batching import NO_ITEM
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.encoding import Encoder
from hetegen_rec.data.errors import DataError, PreparedAnewError
from hetegen_rec.data.prepare import prepare
from hetegen_rec.data.reader import open_reader

ROWS = {"train": 120, "valid": 31, "test": 2}
START = Cursor()


def write_raw(directory, num_rows, seed):
    generator = np.random.default_rng(seed)
    items = generator.integers(0, 12, num_rows)
    table = pa.table(
        {
            "click": generator.integers(0, 2, num_rows),
            "time": np.arange(num_rows) + 1000 * seed,
            "user": [f"u{user}" for user in generator.integers(0, 9, num_rows)],
            "item": [None if item == 5 else int(item) for item in items],
            "age": np.where(items == 3, np.nan, generator.normal(size=num_rows)),
            "tags": [[f"t{tag}" for tag in generator.integers(0, 4, n)] for n in items % 3],
            "history": [generator.integers(0, 14, n).tolist() for n in items % 5],
        }
    )
    directory.mkdir()
    half = num_rows // 2
    pq.write_table(table.slice(0, half), directory / "a.parquet", row_group_size=17)
    pq.write_table(table.slice(half), directory / "b.parquet", row_group_size=50)


def config_of(directory, **data):
    return parse_config(
        {
            "name": "tiny",
            "run_dir": str(directory / "run"),
            "data": {
                **{split: f"{directory}/{split}/*.parquet" for split in ROWS},
                "prepared_dir": str(directory / data.get("encode", "prepared")),
                "rows_per_group": 16,
                "shuffle_rows": 25,
                **data,
            },
            "features": {
                "label": "click",
                "timestamp": "time",
                "user": "user",
                "item": "item",
                "fields": [
                    {"name": "user", "kind": "id"},
                    {"name": "item", "kind": "id", "min_count": 3},
                    {"name": "age", "kind": "numeric", "num_buckets": 4},
                    {"name": "tags", "kind": "multi_valued", "max_length": 2},
                    {"name": "history", "kind": "sequence", "table": "item", "max_length": 3},
                ],
            },
        },
        "test",
    )


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    directory = tmp_path_factory.mktemp("raw")
    for seed, (split, num_rows) in enumerate(ROWS.items()):
        write_raw(directory / split, num_rows, seed)
    return directory


@pytest.fixture(scope="module")
def prepared(raw):
    """The configuration and statistics of encoded shards."""
    config = config_of(raw)
    return config, prepare(config, Alone())


@pytest.fixture(scope="module")
def on_the_fly(raw):
    """The same of raw shards, with an encoder."""
    config = config_of(raw, encode="on_the_fly")
    statistics = prepare(config, Alone())
    return config, statistics, Encoder.load(config.data.prepared_dir, config.features)


def open_split(config, statistics, split, encoder=None, **changes):
    arguments = {
        "rank": 0,
        "world_size": 1,
        "batch_size": 16,
        "train": split == "train",
        "seed": 1,
        "oov_dropout": 0.0,
    }
    return open_reader(config, split, statistics, encoder=encoder, **{**arguments, **changes})


def rows_of(reader):
    """Content of every row, by row id."""
    rows = {}
    for batch in reader.epoch(START):
        bags = []
        for tensor in batch.kjt.to_dict().values():
            bags.append([bag.tolist() for bag in torch.split(tensor.values(), tensor.lengths().tolist())])
        for b, row_id in enumerate(batch.row_ids.tolist()):
            context = {name: column[b].item() for name, column in batch.context.items()}
            rows[row_id] = (batch.labels[b].item(), [column[b] for column in bags], context)
    return rows


@pytest.mark.parametrize("split", list(ROWS))
def test_rows_encoded_on_the_fly_are_the_prepared_rows(prepared, on_the_fly, split):
    expected = rows_of(open_split(*prepared, split))
    config, statistics, encoder = on_the_fly
    assert rows_of(open_split(config, statistics, split, encoder)) == expected
    assert set(expected) == set(range(ROWS[split]))


def test_batches_for_a_cuda_device_are_pinned_by_a_thread_that_uses_that_device(prepared, monkeypatch):
    """No device is needed: what pins and what chooses the device are noted instead."""
    chosen: dict[int, torch.device] = {}
    pinned_by: list[torch.device] = []

    def pin(batch: Batch) -> Batch:
        pinned_by.append(chosen[threading.get_ident()])
        return batch

    monkeypatch.setattr(
        "torch.cuda.set_device", lambda device: chosen.update({threading.get_ident(): device})
    )
    monkeypatch.setattr(Batch, "pin_memory", pin)
    assert rows_of(open_split(*prepared, "valid", device=torch.device("cpu")))
    assert pinned_by == []
    device = torch.device("cuda", 3)
    assert rows_of(open_split(*prepared, "valid", device=device))
    assert pinned_by == [device, device]


def test_frequencies_are_finite_for_every_token(prepared):
    for batch in open_split(*prepared, "valid").epoch(START):
        assert torch.isfinite(batch.log_prior).all()
        assert torch.isfinite(batch.log_rate).all()


def test_context_holds_what_the_schema_names(prepared):
    batch = next(open_split(*prepared, "valid").epoch(START))
    assert set(batch.context) == {"timestamp", "user_key", "user_rows", "item_rows"}
    assert batch.context["timestamp"].tolist() == [1000 + row for row in batch.row_ids.tolist()]


def test_rows_without_an_item_are_told_from_items_without_training_rows(raw, prepared):
    config, statistics = prepared
    items = pq.read_table(raw / "train")["item"].to_pylist()
    reader = open_split(config, statistics, "train", oov_dropout=10.0)
    for batch in reader.epoch(START):
        real = batch.row_ids >= 0
        rows, ids = batch.context["item_rows"][real].tolist(), batch.row_ids[real].tolist()
        assert [count == NO_ITEM for count in rows] == [items[row] is None for row in ids]


@pytest.mark.parametrize(("split", "is_dropped"), [("train", True), ("valid", False)])
def test_ids_are_dropped_from_rows_to_train_on_alone(prepared, split, is_dropped):
    plain, read = (open_split(*prepared, split, oov_dropout=a).epoch(START) for a in (0.0, 10.0))
    is_same = torch.equal(*(torch.cat([batch.ids for batch in batches]) for batches in (plain, read)))
    assert is_same != is_dropped


def test_dropout_spares_ids_that_training_saw_often(prepared):
    config, statistics = prepared
    plain = torch.cat([batch.ids for batch in open_split(config, statistics, "train").epoch(START)])
    reader = open_split(config, statistics, "train", oov_dropout=10.0)
    dropped = torch.cat([batch.ids for batch in reader.epoch(START)])
    users = (plain[:, 0] != dropped[:, 0]).float().mean()
    tags = (plain[:, 3] != dropped[:, 3]).float().mean()
    assert users > 2 * tags > 0


def test_training_is_shuffled_and_evaluation_is_not(prepared):
    train = [row for batch in open_split(*prepared, "train").epoch(START) for row in batch.row_ids.tolist()]
    valid = [row for batch in open_split(*prepared, "valid").epoch(START) for row in batch.row_ids.tolist()]
    assert train != sorted(train)
    assert valid == sorted(valid)


def test_evaluation_fits_any_number_of_ranks(prepared):
    readers = [open_split(*prepared, "test", rank=rank, world_size=3) for rank in range(3)]
    rows = [[row for batch in reader.epoch(START) for row in batch.row_ids.tolist()] for reader in readers]
    assert rows == [[0], [1], [-1]]


def test_lanes_make_the_same_steps_on_one_and_two_ranks(raw, prepared):
    config, statistics = config_of(raw, lanes=4), prepared[1]
    alone = open_split(config, statistics, "train").epoch(START)
    pair = [open_split(config, statistics, "train", rank=r, world_size=2).epoch(START) for r in range(2)]
    for whole, *parts in zip(alone, *pair, strict=True):
        assert torch.cat([part.row_ids for part in parts]).tolist() == whole.row_ids.tolist()


def test_lanes_that_ranks_cannot_share_are_an_error_in_training_only(raw, prepared):
    config, statistics = config_of(raw, lanes=4), prepared[1]
    with pytest.raises(ConfigError, match=r"data\.lanes"):
        open_split(config, statistics, "train", rank=0, world_size=3)
    assert open_split(config, statistics, "valid", rank=0, world_size=3).batches_per_epoch > 0


def test_more_ranks_than_training_rows_are_an_error(prepared):
    with pytest.raises(DataError, match=r"120 row\(s\).*500 lanes"):
        open_split(*prepared, "train", world_size=500, batch_size=500)


def test_a_split_without_encoded_shards_is_an_error(raw, prepared):
    config = config_of(raw, prepared_dir=str(raw / "nowhere"))
    with pytest.raises(DataError, match="nowhere: holds no prepared data"):
        open_split(config, prepared[1], "valid")


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_the_configuration_says_what_becomes_of_bad_shards(raw, prepared, policy, tmp_path):
    encoded = tmp_path / "prepared"
    shutil.copytree(prepared[0].data.prepared_dir, encoded)
    config = config_of(raw, prepared_dir=str(encoded), on_bad_shard=policy)
    reader = open_split(config, prepared[1], "train")
    victim = sorted((encoded / "train").iterdir())[0]
    content = bytearray(victim.read_bytes())
    content[4:200] = bytes(196)
    victim.write_bytes(content)
    if policy == "skip":
        rows = [row for batch in reader.epoch(START) for row in batch.row_ids.tolist()]
        assert (len(rows), sum(skipped.num_rows for skipped in reader.skipped)) == (120, rows.count(-1))
        assert reader.skipped
    else:
        with pytest.raises(DataError, match=victim.name):
            list(reader.epoch(START))


def replace_rows(directory):
    """Other values in as many rows of each file, put in its place by renaming."""
    for path in sorted((directory / "train").iterdir()):
        table = pq.read_table(path)
        items = table.column_names.index("item")
        group_rows = pq.read_metadata(path).row_group(0).num_rows
        table = table.set_column(items, "item", pa.array(np.roll(table["item"].to_pylist(), 1).tolist()))
        pq.write_table(table, directory / "new", row_group_size=group_rows)
        os.utime(directory / "new", ns=(1, 1))  # clocks of file systems may be slow
        (directory / "new").replace(path)


@pytest.fixture
def raw_of_test(tmp_path):
    for seed, (split, num_rows) in enumerate(ROWS.items()):
        write_raw(tmp_path / split, num_rows, seed)
    return tmp_path


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_encoded_rows_of_another_preparation_are_not_trained_on(raw_of_test, policy):
    config = config_of(raw_of_test, on_bad_shard=policy)
    reader = open_split(config, prepare(config, Alone()), "train")
    epoch = reader.epoch(START)
    assert rows_of(reader).keys() == set(range(120))
    replace_rows(raw_of_test)
    prepare(config, Alone())
    with pytest.raises(PreparedAnewError, match=r"train/part-00000-00000\.parquet: was prepared anew"):
        list(epoch)
    assert not reader.skipped


@pytest.mark.parametrize("encode", ["prepared", "on_the_fly"])
def test_statistics_of_an_earlier_preparation_open_nothing(raw_of_test, encode):
    config = config_of(raw_of_test, encode=encode)
    statistics = prepare(config, Alone())
    encoder = Encoder.load(config.data.prepared_dir, config.features) if encode == "on_the_fly" else None
    pq.write_table(pq.read_table(raw_of_test / "test"), raw_of_test / "train" / "c.parquet")
    prepare(config, Alone())
    with pytest.raises(PreparedAnewError, match=rf"{encode}: was prepared anew while it was read; give each"):
        open_split(config, statistics, "valid", encoder)


def test_the_same_rows_may_be_prepared_again(raw_of_test):
    config = config_of(raw_of_test)
    reader = open_split(config, prepare(config, Alone()), "train")
    shutil.rmtree(config.data.prepared_dir)
    prepare(config, Alone())
    assert rows_of(reader).keys() == set(range(120))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_raw_rows_that_are_replaced_while_they_are_read_are_not_trained_on(raw_of_test, policy):
    config = config_of(raw_of_test, encode="on_the_fly", on_bad_shard=policy)
    statistics = prepare(config, Alone())
    encoder = Encoder.load(config.data.prepared_dir, config.features)
    reader = open_split(config, statistics, "train", encoder)
    replace_rows(raw_of_test)
    with pytest.raises(DataError, match=r"\.parquet, row group \d: was written anew since") as error:
        list(reader.epoch(START))
    assert ("more than half" in str(error.value)) == (policy == "skip")
