"""What a grid asks for, and in which order."""

from pathlib import Path

import pytest
from small_grid import (
    FOLLOWED,
    METHODS,
    OTHER,
    grid_values,
    load,
    plan_of,
    plan_with_strategy,
    record,
    sequence_record,
)

from benchmarks.evidence.grid import as_arguments, load_grid
from benchmarks.evidence.plan import Plan, Run
from hetegen_rec.config.errors import ConfigError

BAD_GRIDS = {
    "no such baseline": ({"baseline": "fm"}, r"`baseline: fm` is none of: scratch, uniform"),
    "stages that are no method": (
        {"methods": {**METHODS, "odd": {"title": "", "stages": ["pretrain", "joint"]}}},
        r"`stages: \[pretrain, joint\]` must be \[scratch\] or",
    ),
    "only on nothing": (
        {"methods": {**METHODS, "din": {"title": "", "stages": ["scratch"], "only": ["taobao"]}}},
        r"`methods.din.only: taobao` is none of: ads, shop",
    ),
    "another's model without another way": (
        {"methods": {**METHODS, "odd": {"title": "", "of": "scratch"}}},
        r"`of: scratch` without `evaluate`",
    ),
    "another's model and training of its own": (
        {"methods": {**METHODS, "odd": {**OTHER, "stages": ["scratch"]}}},
        r"`of: scratch` brings `stages`, `overrides`",
    ),
    "settings of what searches for none": (
        {
            "methods": {
                **METHODS,
                "one": {**METHODS["scratch"], "settings_of": "uniform"},
                "odd": {**METHODS["scratch"], "settings_of": "one"},
            }
        },
        r"`methods.odd.settings_of: one` is none of: scratch, uniform",
    ),
    "another way without a model": (
        {"methods": {**METHODS, "odd": {**METHODS["scratch"], "evaluate": {"seed": 1}}}},
        r"`evaluate` needs `of`",
    ),
    "a model of what trains nothing": (
        {"methods": {**METHODS, "other": OTHER, "odd": {**OTHER, "of": "other"}}},
        r"`methods.odd.of: other` is none of: scratch, uniform",
    ),
    "more seeds than there are": (
        {"methods": {**METHODS, "odd": {**METHODS["scratch"], "seeds": 4}}},
        r"`methods.odd.seeds: 4` is above the 3",
    ),
    "a method without a group": ({"groups": {"family": "Ours"}}, r"`methods.scratch.group: None` is none of"),
    "a side without methods": (
        {"contest": {"ours": ["family"], "baselines": ["rest"]}},
        r"`contest.ours: family` is none of",
    ),
    "a choice among nothing": ({"choices": {"form": ["fm"]}}, r"`choices.form: fm` is none of: scratch"),
    "a log of no data set": (
        {"incremental": {"seeds": 1, "data_sets": {"taobao": {}}}},
        r"`incremental.data_sets: taobao` is none of: ads, shop",
    ),
    "an unknown key": ({"sedes": 3}, r"sedes: unknown key \(did you mean `seeds`\?\)"),
}

UNFIT_LOGS = {
    "no times": (
        {"data_sets": {"ads": {"features.timestamp": None}}},
        r"incremental.data_sets.ads: .*config.yaml names no `features.timestamp`",
    ),
    "another stage than the grid's": (
        {"overrides": {"incremental.stage": "joint"}, "data_sets": {"ads": {}}},
        r"makes `incremental.stage` joint, and the grid's is scratch",
    ),
    "a baseline that is not run": (
        {"baseline": "retrain", "data_sets": {"ads": {"incremental.ways": ["finetune"]}}},
        r"`incremental.baseline: retrain` is none of its ways: finetune",
    ),
    "too few periods": (
        {"data_sets": {"ads": {"incremental.periods": 2}}},
        r"incremental.data_sets.ads: .*\n.*`periods: 2` are too few",
    ),
}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of(tmp_path)


@pytest.mark.parametrize("case", BAD_GRIDS)
def test_a_wrong_grid_is_refused(tmp_path, case):
    changes, message = BAD_GRIDS[case]
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **changes)


def test_a_method_that_stands_twice_is_refused(tmp_path):
    load(tmp_path)
    with (tmp_path / "grid.yaml").open("a") as file:
        file.write("methods: {scratch: {title: Other, stages: [joint]}}\n")
    with pytest.raises(ConfigError, match=r"key 'methods' stands twice"):
        load_grid(tmp_path / "grid.yaml")


def test_pretraining_must_leave_epochs_to_fine_tuning(tmp_path):
    values = grid_values(tmp_path)["data_sets"]["ads"]
    with pytest.raises(ConfigError, match=r"`pretrain: 5` leaves none of `total: 5`"):
        load(tmp_path, data_sets={"ads": {**values, "epochs": {"total": 5, "pretrain": 5}}})


def test_a_click_key_is_one_of_the_stage_that_scores():
    overrides = {"click.table_l2": "1e-6", "model.dim": 8, "click.patience": None, "data.train": ["a", "b"]}
    assert as_arguments(overrides, "joint") == [
        "stages.joint.table_l2=1e-6",
        "model.dim=8",
        "stages.joint.patience=null",
        'data.train=["a", "b"]',
    ]


@pytest.mark.parametrize("name", ["evidence", "evidence_quick"])
def test_shipped_grids_resolve(tmp_path, name):
    grid = load_grid(f"benchmarks/{name}.yaml")
    for one in grid.data_sets.values():
        (tmp_path / (one.files or "")).mkdir(exist_ok=True)
    assert Plan(grid, tmp_path, tmp_path).pairs


@pytest.mark.parametrize("case", UNFIT_LOGS)
def test_a_log_that_cannot_be_followed_is_refused_before_anything_runs(tmp_path, case):
    changes, message = UNFIT_LOGS[case]
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, incremental={"seeds": 1, **changes})


def test_every_method_gets_the_same_epochs(plan):
    for run in plan.runs:
        assert sum(run.config.stage(stage).epochs for stage in run.stages) == 5


def test_options_reach_the_stage_that_scores(plan):
    found = {(run.click_stage, run.option): run.config.stage(run.click_stage).table_l2 for run in plan.runs}
    assert found["scratch", "light"] == found["finetune", "light"] == 1e-6
    assert found["scratch", "strong"] == found["finetune", "strong"] == 0.01


def test_a_wrong_override_is_told_before_anything_runs(tmp_path):
    methods = {**METHODS, "odd": {"title": "", "stages": ["joint"], "overrides": {"model.balanse": 1}}}
    with pytest.raises(ConfigError, match=r"ads / odd / light: .*\n.*balanse: unknown key"):
        Plan(load(tmp_path, methods=methods), tmp_path / "out", tmp_path)


def test_data_sets_that_are_not_there_are_left_out(tmp_path):
    values = grid_values(tmp_path)["data_sets"]["ads"]
    grid = load(tmp_path, data_sets={"ads": values, "gone": {**values, "files": "gone"}})
    plan = Plan(grid, tmp_path / "out", tmp_path)
    assert plan.missing == {"gone": tmp_path / "gone"}
    assert {run.data_set for run in plan.runs} == {"ads"}
    with pytest.raises(ConfigError, match="no data set of the grid is there"):
        Plan(load(tmp_path, data_sets={"gone": {**values, "files": "gone"}}), tmp_path / "out", tmp_path)


def test_files_below_the_data_root_replace_the_source(tmp_path):
    (tmp_path / "log").mkdir()
    values = {**grid_values(tmp_path)["data_sets"]["ads"], "files": "log"}
    plan = Plan(load(tmp_path, data_sets={"ads": values}), tmp_path / "out", tmp_path)
    data = plan.first_run("ads").config.data
    assert data.source is None
    assert data.test == (f"{tmp_path}/log/test/*.parquet",)


def test_ids_are_of_what_decides_about_the_scores(tmp_path):
    grid = load(tmp_path)
    here, there = (Plan(grid, tmp_path / out, tmp_path / root) for out, root in (("a", "b"), ("c", "d")))
    assert [run.id for run in here.runs] == [run.id for run in there.runs]
    assert len({run.id for run in here.runs}) == len(here.runs) == 2 * 2 * 2 * 3
    joint = {"stages.joint.dense_lr": 0.5}  # no method here has that stage
    assert [run.id for run in Plan(load(tmp_path, overrides=joint), tmp_path, tmp_path).runs] == [
        run.id for run in here.runs
    ]


def in_order(plan: Plan, score) -> list[tuple[str, str, str, int]]:
    """Every run as they come one after the other."""
    done, order = {}, []
    while run := plan.next_run(done, (), ()):
        is_method = isinstance(run, Run)
        done[run.id] = record(run, valid=score(run)) if is_method else sequence_record(run, {})
        order.append((run.data_set, run.method, run.option, run.seed))
    return order


def test_after_the_search_one_seed_of_everything_comes_before_the_next(plan):
    order = in_order(
        plan, lambda run: {"light": 0.7, "strong": 0.6 if run.method == "scratch" else 0.8}[run.option]
    )
    pairs = [("ads", "scratch"), ("ads", "uniform"), ("shop", "scratch"), ("shop", "uniform")]
    assert order[:8] == [(*pair, option, 0) for pair in pairs for option in ("light", "strong")]
    best = {"scratch": "light", "uniform": "strong"}
    assert order[8:] == [(*pair, best[pair[1]], seed) for seed in (1, 2) for pair in pairs]
    assert plan.num_runs == len(order)


def test_seeds_wait_for_the_search_of_their_pair(plan):
    searched = {run.id: record(run) for run in plan.search_runs("ads", "scratch")}
    under_way = [plan.search_runs(*pair)[i] for pair in plan.pairs[1:] for i in (0, 1)]
    assert str(plan.next_run(searched, (), under_way)) == "ads / scratch / light / seed 1"
    half = dict(list(searched.items())[:1])
    assert plan.next_run(half, (), [*plan.search_runs("ads", "scratch")[1:], *under_way]) is None


def test_a_failed_option_does_not_hold_up_the_others(plan):
    light, strong = plan.search_runs("ads", "scratch")
    others = [run for pair in plan.pairs[1:] for run in plan.search_runs(*pair)]
    chosen = plan.next_run({strong.id: record(strong)}, {light.id}, others)
    assert str(chosen) == "ads / scratch / strong / seed 1"


def test_what_only_scores_shares_the_training_but_not_at_once(tmp_path):
    plan = plan_with_strategy(tmp_path)
    searched = {run.id: record(run) for pair in plan.pairs for run in plan.search_runs(*pair)}
    plain, other = (plan.chosen_runs("ads", method, searched)[1] for method in ("scratch", "other"))
    assert plain.training_id == other.training_id
    assert plain.config.run_dir == other.config.run_dir
    assert plain.id != other.id
    done = {run.id: record(run) for run in plan.runs if run.id != other.id}
    assert plan.next_run(done, (), [plain]) is None
    assert plan.next_run(done, (), ()) == other


def test_what_only_scores_has_no_search_and_comes_behind_what_trains(tmp_path):
    plan = plan_with_strategy(tmp_path)
    order = in_order(plan, lambda run: {"light": 0.6, "strong": 0.7}[run.option])
    assert plan.num_runs == len(order) == 2 * (2 * (2 + 2) + 3)
    assert {option for _, method, option, _ in order if method == "other"} == {"strong"}
    assert [where for where in order if where[0] == "ads" and where[3] == 1] == [
        ("ads", method, "strong", 1) for method in ("scratch", "uniform", "other")
    ]


def test_an_ablation_takes_over_the_settings_of_another_method(tmp_path):
    ablation = {
        "title": "Ablation",
        "stages": ["pretrain", "finetune"],
        "overrides": {"model.balance.form": "dwa"},
        "settings_of": "uniform",
        "seeds": 2,
    }
    plan = plan_of(tmp_path, methods={"ablation": ablation, **METHODS})
    order = in_order(plan, lambda run: {"light": 0.6, "strong": 0.7}[run.option])
    assert [run[2:] for run in order if run[:2] == ("ads", "ablation")] == [("strong", 0), ("strong", 1)]
    assert plan.num_runs == len(order) == 2 * (2 * (2 + 2) + 2)


def test_methods_may_have_fewer_seeds(tmp_path):
    methods = {**METHODS, "uniform": {**METHODS["uniform"], "seeds": 2}}
    plan = plan_of(tmp_path, methods=methods)
    order = in_order(plan, lambda run: 0.7)
    assert [run[3] for run in order if run[:2] == ("ads", "uniform")] == [0, 0, 1]
    assert plan.num_runs == len(order) == 2 * (4 + 3)


def test_data_sets_and_methods_choose_each_other(tmp_path):
    methods = {
        "scratch": {**METHODS["scratch"], "group": "rest"},
        "uniform": {**METHODS["uniform"], "group": "family", "only": ["shop"]},
        "other": {**OTHER, "group": "family", "of": "uniform"},
    }
    data_sets = grid_values(tmp_path)["data_sets"]
    data_sets["shop"]["groups"] = ["family"]
    groups = {"family": "Ours", "rest": "Others"}
    plan = plan_of(tmp_path, methods=methods, data_sets=data_sets, groups=groups)
    assert plan.pairs == [("ads", "scratch"), ("shop", "uniform"), ("shop", "other")]


def test_logs_are_followed_behind_everything_else_seed_after_seed(tmp_path):
    plan = plan_of(tmp_path, incremental=FOLLOWED)
    order = in_order(plan, lambda run: 0.7)
    assert plan.num_runs == len(order)
    ways = "finetune, retrain, fesail"
    assert order[-4:] == [(name, "incremental", ways, seed) for seed in (0, 1) for name in ("ads", "shop")]
    assert "incremental" not in {method for _, method, _, _ in order[:-4]}


def test_a_log_is_followed_by_the_epochs_and_settings_of_its_stage(tmp_path):
    overrides = {"click.table_l2": "1e-4", "incremental.replay_rows": 7}
    followed = {**FOLLOWED, "stage": "joint", "overrides": overrides}
    ads, shop = plan_of(tmp_path, incremental=followed).sequences[:2]
    for run in (ads, shop):
        assert run.config.incremental.stage == "joint"
        assert run.config.incremental.replay_rows == 7
        assert (run.config.stage("joint").epochs, run.config.stage("joint").table_l2) == (5, 1e-4)
    assert (ads.config.incremental.periods, shop.config.incremental.periods) == (8, 5)
    assert shop.config.data.source.seed == 1  # an override of the data set


def test_ids_of_followed_logs_hold_no_places_and_change_no_others(tmp_path):
    grid = load(tmp_path, incremental=FOLLOWED)
    here, there = (Plan(grid, tmp_path / out, tmp_path / root) for out, root in (("a", "b"), ("c", "d")))
    assert [run.id for run in here.sequences] == [run.id for run in there.sequences]
    assert len({run.id for run in here.everything}) == len(here.everything)
    assert [run.id for run in here.runs] == [run.id for run in plan_of(tmp_path).runs]


def test_logs_that_are_not_there_are_not_followed(tmp_path):
    values = grid_values(tmp_path)["data_sets"]["ads"]
    data_sets = {"ads": values, "gone": {**values, "files": "gone"}}
    plan = plan_of(
        tmp_path, data_sets=data_sets, incremental={"seeds": 1, "data_sets": {"gone": {}, "ads": {}}}
    )
    assert [run.data_set for run in plan.sequences] == ["ads"]
