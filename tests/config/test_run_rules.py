"""Rules between the sections of a run's configuration, and the configurations that ship."""

from pathlib import Path

import pytest
from minimal_run import minimal_run

from hetegen_rec.config import ConfigError, load_config, save_config
from hetegen_rec.config.loading import parse_config

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"train": []}}, "`train` is empty"),
        ({"data": {"valid": []}}, "`valid` is empty"),
        ({"data": {"source": {"name": "synthetic"}}}, "`source` needs `raw_dir`"),
        ({"data": {"source": {"name": "criteo"}}}, "'movielens-100k' or 'synthetic'"),
        ({"data": {"lanes": 3}}, r"`train.batch_size: 1024` must be divisible by `data.lanes: 3`"),
        ({"model": {"dim": 30}}, r"`dim: 30` must be a multiple of 4"),
        ({"model": {"dim": 32, "denoiser": {"attention": {"num_heads": 5}}}}, "num_heads: 5"),
        ({"distributed": {"tables": {"usr": {}}}}, r"`distributed.tables.usr` is not a table.*default, user"),
        (
            {"model": {"balance": {"form": "aligned"}, "noise": {"label_in_set": False}}},
            "needs `model.noise.label_in_set: true`",
        ),
        (
            {"model": {"balance": {"form": "informative", "exponent": -1.0}}},
            "model.balance: `exponent: -1.0` has no effect with `form: informative`",
        ),
        ({"model": {"balance": {"noise_bins": 8}}}, "`noise_bins: 8` has no effect with `form: learnable`"),
        ({"model": {"noise": {"marginal_fraction": 0.5}}}, "no effect with `kind: mask`"),
        (
            {"data": {"source": {"name": "movielens-100k", "rows": 5}, "raw_dir": "raw"}},
            "data.source: `rows: 5` has no effect on source `movielens-100k`",
        ),
        ({"stages": {"pretrain": {"patience": 2}}}, "`pretrain.patience: 2` has no effect"),
        ({"stages": {"joint": {"warmup": 1.5}}}, "stages.joint.warmup: .*less than or equal to 1"),
    ],
)
def test_contradictions_are_errors_that_name_the_key(sections, message):
    with pytest.raises(ConfigError, match=message):
        minimal_run(**sections)


def test_built_in_source_needs_no_paths():
    values = {"source": {"name": "movielens-100k"}, "raw_dir": "data/raw", "prepared_dir": "data/p"}
    config = parse_config(
        {
            "name": "demo",
            "run_dir": "runs/demo",
            "data": values,
            "features": {"label": "click", "fields": [{"name": "user", "kind": "id"}]},
        },
        "test",
    )
    assert config.data.raw_paths("train") == ("data/raw/train/*.parquet",)
    assert list(config.splits()) == ["train", "valid", "test"]


def test_sections_cannot_be_changed_after_loading():
    config = minimal_run()
    with pytest.raises(ValueError, match="frozen"):
        config.train.batch_size = 1  # type: ignore[misc]


def test_configurations_ship():
    assert SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configuration_loads_and_saves(path, tmp_path):
    config = load_config(path)
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


def test_runs_that_ship_do_not_write_into_each_other():
    directories = [load_config(path).run_dir for path in SHIPPED]
    assert len(set(directories)) == len(directories)


@pytest.mark.parametrize(
    ("stage", "table_l2", "read"),
    [
        ("pretrain", 0.0, {"log_prior"}),
        ("joint", 1e-3, {"log_prior", "log_rate"}),
        ("scratch", 0.0, set()),
        ("finetune", 1e-3, {"log_rate"}),
    ],
)
def test_frequencies_that_a_stage_reads(stage, table_l2, read):
    config = minimal_run(stages={stage: {"table_l2": table_l2}})
    assert config.frequencies(stage) == read
