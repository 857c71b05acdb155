"""The table of where the forms of balancing spend the budget: which form passes, and that it runs."""

import pytest

from benchmarks.allocation import Allocation, config_of, measure, report
from hetegen_rec.distributed.runtime import start_runtime

SHARES = {"department": 0.2, "intent": 0.4, "random_code": 0.15, "random_number": 0.15, "segment": 0.1}


def allocated(**shares):
    end = {**SHARES, **shares}
    return Allocation(end=end, mean=end, relative={name: 1.0 - share for name, share in end.items()})


@pytest.mark.parametrize(
    ("found", "passes"),
    [
        (allocated(), True),
        (allocated(random_code=0.2, segment=0.05), True),
        (allocated(random_code=0.25, segment=0.0), False),
        (allocated(intent=0.2, segment=0.3), False),
        (allocated(**dict.fromkeys(SHARES, 0.2)), False),
    ],
    ids=["right", "noise at the even share", "one noise above it", "hard at it", "even"],
)
def test_a_form_passes_if_noise_gets_no_more_than_its_share_and_hard_fields_more(found, passes):
    assert found.passes == passes


def test_the_table_has_shares_in_percent_and_wants_every_seed_to_pass():
    failed = allocated(intent=0.1, segment=0.4)
    lines = list(
        report({"learnable": [allocated(), allocated()], "uniform": [allocated(), failed]}, steps=400)
    )
    assert lines[-2] == (
        "| `learnable` | 20.0 / 20.0 | 40.0 / 40.0 | 15.0 / 15.0 | **yes** | 0.800 | 0.600 | 0.850 | 0.800 |"
    )
    assert "| 25.0 / 25.0 | 15.0 / 15.0 | no (1 of 2) |" in lines[-1]
    assert "An even share is 20.0." in " ".join(lines)


def test_it_trains_and_reads_what_it_has_trained(tmp_path):
    with start_runtime("cpu") as runtime:
        first = measure("learnable", 0, 2, tmp_path, runtime)
        done = (tmp_path / "learnable-2" / "seed-0" / "pretrain" / "done.json").stat().st_mtime_ns
        again = measure("learnable", 0, 2, tmp_path, runtime)
    assert first == again
    assert (tmp_path / "learnable-2" / "seed-0" / "pretrain" / "done.json").stat().st_mtime_ns == done
    names = {field.name for field in config_of("learnable", 0, 2, tmp_path).features.fields}
    assert set(first.end) == names
    assert sum(first.end.values()) == pytest.approx(1.0)
    assert first.even == pytest.approx(1 / len(names))
