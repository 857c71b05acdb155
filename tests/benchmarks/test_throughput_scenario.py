import pytest
import yaml

from benchmarks.throughput.scenario import SCENARIOS, cases_of, load_scenario
from hetegen_rec.config.errors import ConfigError

NAMES = sorted(path.stem for path in SCENARIOS.glob("*.yaml"))
SMALLEST = {"question": "How long?", "variants": [{"name": "a"}]}


def load(tmp_path, **changed):
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump({**SMALLEST, **changed}))
    return load_scenario(str(path))


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_of_a_shipped_scenario_is_a_valid_run(name):
    cases = cases_of(load_scenario(name), with_optional=True)
    kinds = {
        (case.measure, case.stage, case.ranks, case.log, case.before, case.jobs, str(case.config))
        for case in cases
    }
    assert len(kinds) == len(cases)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"repeat": 3}, "repeat"),
        ({"variants": [{"name": "a", "measure": "magic"}]}, "variants.0.measure"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "'a' stands twice"),
        ({"variants": [{"name": "a"}, {"name": "b", "against": "c"}]}, "`against: c`"),
        ({"variants": [{"name": "a", "optional": True}]}, "cannot be `optional`"),
        ({"variants": [{"name": "a", "jobs": 2}]}, "`jobs: 2` needs `ranks`"),
        ({"config": {"features": {}}}, "`config.features`"),
    ],
)
def test_a_wrong_key_of_a_scenario_is_named(tmp_path, changed, told):
    with pytest.raises(ConfigError, match=r"problem\(s\) in the configuration") as error:
        load(tmp_path, **changed)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.width=3", r"(?s)'a'.*model\.width"),
        ("log.rowz=3", r"(?s)'a'.*rowz"),
        ("log.table_rows=3", "table_rows: 3"),
        ("model", "key=value"),
    ],
)
def test_a_wrong_override_is_named(tmp_path, override, told):
    with pytest.raises(ConfigError, match=told):
        cases_of(load(tmp_path), [override])


def test_a_name_that_is_no_scenario_is_told_with_those_there_are():
    with pytest.raises(ConfigError, match=r"there are: .*checkpoint.*export.*step"):
        load_scenario("stepp")


def test_overrides_of_a_variant_stay_with_it_and_common_ones_come_last(tmp_path):
    scenario = load(
        tmp_path,
        log={"fields": 2},
        config={"train": {"batch_size": 8}},
        variants=[
            {"name": "a", "stage": "pretrain"},
            {"name": "b", "overrides": ["train.batch_size=16", "log.rows=5"], "measure": "reader"},
            {"name": "c", "overrides": ["train.batch_size=32"], "optional": True, "against": "b"},
        ],
    )
    a, b, c = cases_of(scenario, with_optional=True)
    assert [case.config.train.batch_size for case in (a, b, c)] == [8, 16, 32]
    assert (a.stage, b.stage) == ("pretrain", "scratch")
    assert (a.measure, b.measure) == ("trainer", "reader")
    assert (b.log.rows, b.log.fields) == (5, 2)
    assert [case.against for case in (a, b, c)] == ["a", "a", "b"]
    assert [case.config.train.batch_size for case in cases_of(scenario, ["train.batch_size=4"])] == [4, 4]
