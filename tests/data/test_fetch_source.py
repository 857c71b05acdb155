import json

import pyarrow.parquet as pq
import pytest

from hetegen_rec.config import ConfigError, load_config
from hetegen_rec.config.data import DataConfig, SourceConfig
from hetegen_rec.data.raw import expand_paths
from hetegen_rec.data.sources import SourceError, fetch_source, synthetic
from hetegen_rec.data.sources.raw_shards import shard_rows, split_rows


def source(**settings):
    return SourceConfig(name="synthetic", **{"rows": 100, "id_cardinality": 20, **settings})


def snapshot(directory):
    return {path.relative_to(directory): path.stat().st_mtime_ns for path in directory.rglob("*.*")}


def test_complete_data_are_left_untouched(tmp_path):
    fetch_source(source(), tmp_path / "raw")
    before = snapshot(tmp_path / "raw")
    fetch_source(source(), tmp_path / "raw")
    assert snapshot(tmp_path / "raw") == before


def test_a_configuration_finds_them_in_a_directory_called_what_a_glob_is(tmp_path):
    raw_dir = f"{tmp_path}/raw[1]*"
    config = DataConfig(source=source(), raw_dir=raw_dir, prepared_dir=f"{tmp_path}/prepared")
    fetch_source(config.source, raw_dir)
    assert all(expand_paths(config.raw_paths(split)) for split in ("train", "valid", "test"))


@pytest.mark.parametrize("change", [{"rows": 200}, {"id_cardinality": 30}, {"seed": 1}])
def test_other_settings_rebuild_the_data(tmp_path, change):
    fetch_source(source(), tmp_path / "raw")
    before = pq.read_table(tmp_path / "raw" / "train")
    fetch_source(source(**change), tmp_path / "raw")
    assert not pq.read_table(tmp_path / "raw" / "train").equals(before)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"PAR1")])
def test_a_lost_or_truncated_shard_is_repaired(tmp_path, damage):
    fetch_source(source(), tmp_path / "raw")
    shard = tmp_path / "raw" / "train" / "part-00001.parquet"
    content = shard.read_bytes()
    damage(shard)
    fetch_source(source(), tmp_path / "raw")
    assert shard.read_bytes() == content


def test_a_failure_leaves_nothing_behind_and_keeps_the_old_data(tmp_path, monkeypatch):
    fetch_source(source(), tmp_path / "raw")
    before = snapshot(tmp_path / "raw")

    def fail_halfway(process, directory):
        (directory / "train").mkdir()
        raise OSError("no space left on device")

    monkeypatch.setattr(synthetic, "write", fail_halfway)
    with pytest.raises(OSError, match="no space"):
        fetch_source(source(seed=1), tmp_path / "raw")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    assert snapshot(tmp_path / "raw") == before


@pytest.mark.parametrize("manifest", [None, "not json", "[]", json.dumps({"name": "mine"})])
def test_a_directory_of_somebody_else_is_refused_and_kept(tmp_path, manifest):
    (tmp_path / "notes.txt").write_text("mine")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(SourceError, match=r"will not be overwritten.*data\.raw_dir"):
        fetch_source(source(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_empty_directory_is_filled(tmp_path):
    fetch_source(source(), tmp_path)
    assert (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("num_rows", [10, 99, 72_855])
def test_splits_are_consecutive_and_cover_all_rows(num_rows):
    train, valid, test = split_rows(num_rows).values()
    assert [*train, *valid, *test] == list(range(num_rows))
    assert len(train) == num_rows * 8 // 10
    assert abs(len(valid) - len(test)) <= 1


@pytest.mark.parametrize(("num_rows", "num_shards"), [(8, 4), (9, 4), (3, 4), (1, 1), (17, 5)])
def test_shards_are_consecutive_and_cover_all_rows(num_rows, num_shards):
    shards = shard_rows(range(5, 5 + num_rows), num_shards)
    assert [row for shard in shards for row in shard] == list(range(5, 5 + num_rows))
    assert all(shards)
    assert len(shards) <= num_shards


@pytest.mark.parametrize(
    "name", ["movielens_100k", "movietweetings_100k", "frappe", "criteo_10k", "synthetic"]
)
def test_shipped_config_loads(name, pytestconfig):
    config = load_config(pytestconfig.rootpath / "configs" / f"{name}.yaml")
    assert config.name == name
    assert list(config.splits()) == ["train", "valid", "test"]


def test_shipped_config_names_columns_that_the_synthetic_source_writes(pytestconfig):
    features = load_config(pytestconfig.rootpath / "configs" / "synthetic.yaml").features
    columns = {field.column for field in features.fields}
    left_out = set(synthetic.SCHEMA.names) - columns
    assert columns <= set(synthetic.SCHEMA.names)
    assert left_out == {features.label, features.timestamp, synthetic.TRUE_PROBABILITY}


def test_source_without_directory_is_a_config_error(pytestconfig):
    path = pytestconfig.rootpath / "configs" / "synthetic.yaml"
    with pytest.raises(ConfigError, match="raw_dir"):
        load_config(path, ["data.raw_dir=null"])
