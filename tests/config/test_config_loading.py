"""YAML files in, RunConfig out: overrides, errors that name the key, and the way back."""

import resource
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hetegen_rec.config import ConfigError, load_config, save_config
from hetegen_rec.config.loading import parse_config, parse_yaml
from hetegen_rec.config.run import StageConfig

TEXT = """
name: demo
run_dir: runs/demo
data:
  train: raw/train/*.parquet
  valid: [raw/valid/*.parquet]
  prepared_dir: data/demo
features:
  label: click
  user: user
  fields:
    - {name: user, kind: id}
    - {name: price, kind: numeric}
train:
  batch_size: 256
"""


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT)
    return path


def test_defaults_fill_what_the_file_leaves_out(config_path):
    config = load_config(config_path)
    assert config.train.batch_size == 256
    assert config.train.eval_batch_size == 4096
    assert config.data.train == ("raw/train/*.parquet",)
    assert list(config.splits()) == ["train", "valid"]
    assert config.stage_dir("finetune") == Path("runs/demo/finetune")


def test_overrides_reach_any_depth_and_are_typed_like_the_file(config_path):
    overrides = [
        "train.max_steps=4",
        "stages.pretrain.table_lr=1e-3",
        "model.noise.label_in_set=false",
        "data.test=[a.parquet, b.parquet]",
        "stages.pretrain.patience=null",
    ]
    config = load_config(config_path, overrides)
    assert config.train.max_steps == 4
    assert config.stages.pretrain.table_lr == 0.001
    assert config.model.noise.label_in_set is False
    assert config.data.test == ("a.parquet", "b.parquet")
    assert config.stages.pretrain.patience is None


def test_override_of_one_key_keeps_the_rest_of_its_section(config_path):
    config = load_config(config_path, ["train.log_every=7"])
    assert (config.train.log_every, config.train.batch_size) == (7, 256)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", "'train.max_steps' is not of the form key=value"),
        ("=4", "is not of the form key=value"),
        ("name.first=a", "`name` is a value, not a section"),
        ("train.max_steps=[4", "override 'train.max_steps=\\[4': not valid YAML"),
    ],
)
def test_malformed_override_is_named(config_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_path, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=2", r"train.batchsize: unknown key \(did you mean `batch_size`\?\)"),
        ("trian.batch_size=2", r"trian: unknown key \(did you mean `train`\?\)"),
        ("model.denoiser.attention.heads=2", r"heads: unknown key \(did you mean `num_heads`\?\)"),
        ("train.zzz=2", "train.zzz: unknown key; known keys: batch_size, eval_batch_size"),
        ("train.batch_size=many", r"train.batch_size: .*\(found 'many', str\)"),
        ("train.batch_size='256'", r"train.batch_size: .*\(found '256', str\)"),
        ("train.batch_size=2.5", r"train.batch_size: .*\(found 2.5, float\)"),
        ("train.batch_size=0", r"train.batch_size: .*greater than 0"),
        ("data.shuffle=1", r"data.shuffle: .*\(found 1, int\)"),
        ("train.precision=fp8", r"train.precision: .*'fp32' or 'bf16'"),
        ("model.noise.t_min=1.0", r"model.noise.t_min: .*less than 1"),
        ("features.fields=[{name: a}]", r"features.fields.0.kind: is missing; add it"),
    ],
)
def test_wrong_key_or_value_is_named_with_what_was_found(config_path, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(config_path, [override])
    assert str(config_path) in str(caught.value)


def test_unknown_key_of_a_field_is_compared_with_the_keys_of_fields(config_path):
    with pytest.raises(ConfigError, match=r"unknown key \(did you mean `hash_size`\?\)"):
        load_config(config_path, ["features.fields=[{name: a, kind: id, vocabulary: hash, hashsize: 9}]"])


def test_all_problems_are_reported_at_once(config_path):
    with pytest.raises(ConfigError, match=r"2 problem\(s\)"):
        load_config(config_path, ["train.zzz=2", "train.log_every=-1"])


def test_key_that_stands_twice_is_an_error_not_the_last_value(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nrun_dir: b\nname: c\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: key 'name' stands twice \(line 3\)"):
        load_config(path)


def test_a_section_may_take_in_others(config_path):
    stages = """
stages:
  pretrain: &long {epochs: 9, table_lr: 0.5}
  finetune: &short {<<: *long, epochs: 1}
  scratch: {<<: *short, table_lr: 0.1}
"""
    config_path.write_text(TEXT + stages)
    found = load_config(config_path).stages
    assert (found.finetune.epochs, found.finetune.table_lr) == (1, 0.5)
    assert (found.scratch.epochs, found.scratch.table_lr) == (1, 0.1)
    config_path.write_text(TEXT + stages.replace("table_lr: 0.1", "epochs: 1, epochs: 2"))
    with pytest.raises(ConfigError, match=r"key 'epochs' stands twice \(line 20\)"):
        load_config(config_path)


def test_a_section_may_take_in_one_that_lies_deeper():
    text = "base: &base {a: 1, b: 2}\nx: {y: {z: &z {<<: *base, a: 3}}}\nw: {<<: *z}\n"
    assert parse_yaml(text, "here")["w"] == parse_yaml(text, "here")["x"]["y"]["z"] == {"a": 3, "b": 2}


def test_file_that_is_not_utf_8_is_named(config_path):
    config_path.write_bytes(TEXT.replace("demo", "d\u00e9mo").encode("latin-1"))
    with pytest.raises(ConfigError, match=r"run\.yaml: is not UTF-8 \(invalid .* at byte \d+\); save it so"):
        load_config(config_path)


@pytest.mark.parametrize("text", ["", "- a list\n", "just text\n"])
def test_file_without_keys_is_an_error(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="expected `key: value` lines"):
        load_config(path)


def test_missing_file_and_broken_yaml_name_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read: No such file"):
        load_config(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"broken.yaml: not valid YAML"):
        load_config(broken)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.max_steps=4", "data.lanes=4", "distributed.host_memory_gb=1.5"),
        ("stages.joint.max_grad_norm=null", "stages.joint.patience=null", "data.test=[]"),
        ("distributed.tables={default: {sharding: [row_wise]}, user: {sharding: data_parallel}}",),
        ("features.fields=[{name: user, kind: id}, {name: h, kind: sequence, table: user}]",),
    ],
)
def test_saved_configuration_loads_back_equal(config_path, tmp_path, overrides):
    config = load_config(config_path, overrides)
    saved = tmp_path / "resolved.yaml"
    save_config(config, saved)
    assert load_config(saved) == config


def test_a_configuration_that_cannot_be_written_leaves_the_earlier_one(config_path, tmp_path):
    saved = tmp_path / "saved.yaml"
    save_config(load_config(config_path), saved)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # what a full disk would do
    try:
        with pytest.raises(OSError, match="File too large"):
            save_config(load_config(config_path, ["name=other"]), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_config(saved) == load_config(config_path)


def test_saved_configuration_spells_out_every_default(config_path, tmp_path):
    saved = tmp_path / "resolved.yaml"
    save_config(load_config(config_path), saved)
    values = yaml.safe_load(saved.read_text())
    assert set(values["stages"]["pretrain"]) == set(StageConfig.model_fields)
    assert values["features"]["fields"][1]["num_buckets"] == 32


@given(
    rate=st.floats(min_value=1e-12, max_value=1e6),
    epochs=st.integers(1, 10**6),
    patience=st.none() | st.integers(1, 100),
)
def test_any_legal_number_survives_the_way_through_yaml(tmp_path_factory, rate, epochs, patience):
    values = yaml.safe_load(TEXT)
    values["stages"] = {"joint": {"table_lr": rate, "epochs": epochs, "patience": patience}}
    config = parse_config(values, "test")
    saved = tmp_path_factory.mktemp("config") / "resolved.yaml"
    save_config(config, saved)
    assert load_config(saved) == config
