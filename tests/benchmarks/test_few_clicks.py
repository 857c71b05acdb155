"""Pre-training where few rows are labelled: who is compared, on which rows, and that it runs."""

import pyarrow.parquet as pq
import pytest
import yaml
from small_grid import grid_values

from benchmarks import few_clicks
from benchmarks.evidence.grid import load_grid
from benchmarks.evidence.places import Places
from hetegen_rec.cli import main as hetegen
from hetegen_rec.evaluation.results import write_evaluation

SHARES = [0.05, 0.2]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A grid whose only data set lies in files, with one setting to choose besides the stronger one."""
    directory = tmp_path_factory.mktemp("few_clicks")
    values = grid_values(directory)
    one = {**values["data_sets"]["ads"], "files": "raw", "epochs": {"total": 2, "pretrain": 1}}
    one["search"] = {"light": {"click.table_l2": "1e-3"}}
    values.update(data_sets={"ads": one}, overrides={"train.tensorboard": False, "train.max_steps": 8})
    path = directory / "grid.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    assert hetegen(["prepare", "--config", one["config"]]) == 0
    return path


@pytest.fixture
def log(grid, tmp_path):
    loaded = load_grid(grid)
    places = Places(loaded, tmp_path, grid.parent).data("ads")
    return few_clicks.Log("ads", loaded.data_sets["ads"], places, loaded.overrides, SHARES, tmp_path / "ads")


def evaluated(log, seed, share, side, option, valid, test):
    splits = {"valid": {"auc": valid}, "test": {"auc": test}}
    evaluation = {"run": "ads", "stage": side.stage, "checkpoint": "", "step": 1, "splits": splits}
    write_evaluation(log.run_dir(seed, share, side, option) / side.stage, evaluation)


def test_a_larger_share_has_all_rows_of_a_smaller_one(log):
    for share in SHARES:
        few_clicks.write_share(log, share, seed=3)
    small, large = (pq.read_table(log.rows(3, share)) for share in SHARES)
    assert small.num_rows == 120
    assert large.num_rows == 480
    assert set(map(str, small.to_pylist())) < set(map(str, large.to_pylist()))


def test_settings_are_those_of_the_grid_and_one_with_ten_times_the_l2(log):
    assert [float(one["click.table_l2"]) for one in log.options.values()] == [1e-3, 1e-2]


def test_fewer_rows_are_trained_for_more_epochs(log):
    assert [log.epochs(share) for share in (1.0, 0.25, 0.01)] == [2, 4, 20]


def test_each_side_has_what_is_best_on_valid_over_all_seeds(log):
    for share in SHARES:
        few_clicks.write_share(log, share, seed=0)
        for side in (*few_clicks.PRETRAINED, *few_clicks.FROM_SCRATCH):
            for option in log.options:
                for seed in range(2):
                    evaluated(log, seed, share, side, option, 0.6, 0.9)
    (pretrained,), own = few_clicks.PRETRAINED, few_clicks.FROM_SCRATCH[1]
    for seed in range(2):  # the one that is not best with every seed, and worse on test
        evaluated(log, seed, 0.05, own, "stronger", (0.59, 0.65)[seed], 0.70 + 0.01 * seed)
        evaluated(log, seed, 0.05, pretrained, "light", 0.7, 0.72 + 0.0102 * seed)
    lines = list(few_clicks.report([log], seeds=2))
    assert lines[-2] == (
        "| ads | 5 % | 120 | 0.7050 ± 0.0071 | 0.7251 ± 0.0072 | +0.0201 | **0.003** "
        "| scratch_own, stronger / finetune, light |"
    )
    assert "| +0.0000 |" in lines[-1]


def test_the_program_trains_every_side_on_its_rows(grid, tmp_path, capsys):
    words = ["--grid", str(grid), "--data-root", str(grid.parent), "--runs", str(tmp_path / "runs")]
    out = tmp_path / "table.md"
    assert (
        few_clicks.main([*words, "--shares", "0.2", "--seeds", "1", "--cores", "1", "--out", str(out)]) == 0
    )
    assert "| ads | 20 % | 480 | 0." in out.read_text(encoding="utf-8")
    runs = tmp_path / "runs" / "ads" / "seed-0"
    configs = {
        path.parent.name: yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        for name in ("finetune", "scratch")
        for path in runs.glob(f"share-0.2/*/{name}")
    }
    assert len(configs) == 6
    start = configs["finetune-light"]["stages"]["finetune"]["start_from"]
    assert start.startswith(str(runs / "all" / "pretrain" / "checkpoints" / "step-"))
    kept = {name: config["data"]["keep_ids_of"] is not None for name, config in configs.items()}
    assert {name for name, keeps in kept.items() if not keeps} == {
        "scratch_own-light",
        "scratch_own-stronger",
    }
    pretrained = yaml.safe_load((runs / "all" / "pretrain" / "config.yaml").read_text(encoding="utf-8"))
    assert not pretrained["model"]["noise"]["label_in_set"]
    assert capsys.readouterr().out.startswith("# Pre-training where few rows are labelled")


def test_a_data_set_that_is_not_there_is_named(grid, capsys):
    with pytest.raises(SystemExit):
        few_clicks.main(["--grid", str(grid), "--data-root", str(grid.parent), "--data-sets", "add"])
    assert "are: ads" in capsys.readouterr().err
