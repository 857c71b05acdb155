from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_model import Job

from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.distributed.schedule import Decay, LearningRates, rate_factor

DECAYS: list[Decay] = ["none", "linear", "cosine"]


@given(st.integers(1, 1000), st.floats(0, 1), st.sampled_from(DECAYS))
def test_rates_rise_to_one_and_never_rise_again(total: int, warmup: float, decay: Decay) -> None:
    factors = [rate_factor(step, total, warmup, decay) for step in range(total + 1)]
    top = factors.index(max(factors))
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[0] > 0


def test_shape_of_the_schedule() -> None:
    assert [rate_factor(step, 10, 0.4, "none") for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate_factor(5, 10, 0.0, "linear") == pytest.approx(0.5)
    assert rate_factor(5, 10, 0.0, "cosine") == pytest.approx(0.5)
    assert rate_factor(10, 10, 0.2, "linear") == rate_factor(10, 10, 0.2, "cosine") == 0


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with start_runtime("cpu") as runtime:
        yield runtime


def test_rates_reach_fused_tables_and_dense_weights_but_not_difficulty(runtime: Runtime) -> None:
    job = Job(runtime, "table_wise", "sgd")
    rates = LearningRates(job.optimizer, total_steps=4, warmup=0.5, decay="linear")
    assert rates.by_name() == pytest.approx({"tables": 0.05, "dense": 5e-4, "difficulty": 0.05})
    for _ in range(4):
        rates.advance()
    assert rates.by_name() == pytest.approx({"tables": 0.0, "dense": 0.0, "difficulty": 0.05})
    job.model.module.difficulty.requires_grad_(False)
    before = job.scores()
    job.train(1)
    assert job.scores() == before


def test_a_resumed_schedule_goes_on_from_its_step(runtime: Runtime) -> None:
    job = Job(runtime, "table_wise")
    rates = LearningRates(job.optimizer, total_steps=10, warmup=0.0, decay="cosine", step=5)
    assert rates.by_name()["dense"] == pytest.approx(5e-4)
