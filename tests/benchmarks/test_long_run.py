import json

import psutil
import pytest

from benchmarks.long_run import Findings, Sample, intervals_of, main, page, resident_bytes
from benchmarks.throughput.scenario import Scenario, cases_of

TINY = [
    "log.fields=3",
    "log.table_rows=60",
    "log.rows_per_group=40",
    "log.rows_per_file=150",
    "train.batch_size=16",
    "data.shuffle_rows=50",
    "train.evaluations_per_epoch=2",
    "train.tensorboard=false",
]


def looks(*resident):
    """Two a minute, and one that ends the last of them."""
    samples = [Sample(15.0 + 30.0 * number, size, 10 * number) for number, size in enumerate(resident)]
    return [*samples, Sample(30.0 * len(resident) + 1.0, 1, 0)]


def test_a_minute_is_the_mean_of_its_looks_and_stands_beside_the_first():
    intervals = intervals_of(looks(90, 110, 100, 104, 101, 101), 60.0)
    assert [one.seconds for one in intervals] == [60.0, 120.0, 180.0]
    assert [one.resident for one in intervals] == [100.0, 102.0, 101.0]
    assert [(one.least, one.most, one.rows) for one in intervals] == [
        (90, 110, 10),
        (100, 104, 30),
        (101, 101, 50),
    ]
    assert Findings(intervals, 50, 180.0).changes == pytest.approx([0.0, 0.02, 0.01])


@pytest.mark.parametrize(
    ("resident", "is_flat"),
    [
        ((100, 100, 104, 104), True),
        ((100, 100, 106, 106), False),
        ((100, 100, 94, 94), False),
        ((100, 100, 106, 106, 100, 100), False),  # also where it comes back
    ],
)
def test_flat_is_within_the_tolerance_in_every_minute(resident, is_flat):
    findings = Findings(intervals_of(looks(*resident), 60.0), 50, 180.0)
    assert findings.is_flat == is_flat
    (case,) = cases_of(Scenario.model_validate({"question": "?", "variants": [{"name": "one"}]}))
    assert ("Reached: " if is_flat else "Missed: ") in " ".join(page(findings, case))


def test_a_process_that_is_gone_holds_nothing():
    process = psutil.Popen(["true"])
    process.wait()
    assert resident_bytes(process) == 0


def test_it_trains_the_rows_and_the_minutes_and_leaves_numbers_and_a_table(tmp_path):
    options = ["--rows", "400", "--minutes", "0.02", "--every", "0.4", "--results", str(tmp_path)]
    assert main([*options, *TINY]) == 0
    numbers = json.loads((tmp_path / "long_run.json").read_text())
    assert numbers["rows"] >= 400
    assert numbers["seconds"] > 1.2
    assert len(numbers["intervals"]) >= 2
    rows = [one["rows"] for one in numbers["intervals"]]
    assert rows == sorted(rows)
    assert 0 < rows[-1] <= numbers["rows"]
    first = numbers["intervals"][0]
    assert first["change"] == 0.0
    assert 0 < first["least"] <= first["resident"] <= first["most"]
    assert numbers["change_at_end"] == numbers["intervals"][-1]["change"]
    assert numbers["is_flat"] == all(abs(one["change"]) <= 0.05 for one in numbers["intervals"])
    text = (tmp_path / "long_run.md").read_text()
    assert "`python -m benchmarks.long_run --rows 400" in text
    assert text.count("\n| ") == 2 + len(numbers["intervals"])
