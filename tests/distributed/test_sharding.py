from typing import Any

import pytest
import torch
from multirank import run_ranks
from toy_model import DIM, Job

from hetegen_rec.config.run import CommunicationPrecision, DistributedConfig
from hetegen_rec.distributed import sharding
from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.distributed.sharding import init_tables, make_sharders, table_weights

KINDS = ["table_wise", "column_wise", "table_column_wise", "row_wise", "table_row_wise", "grid_shard"]
STEPS = 3


def _scores_under_plans(cases: list[tuple[str, str]]) -> dict[tuple[str, str], Any]:
    """Scores at the start and after some steps, by kind of sharding and table optimizer."""
    found = {}
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        for kind, optimizer in cases:
            job = Job(runtime, kind, optimizer)
            before = job.scores()
            job.train(STEPS)
            found[kind, optimizer] = (before, job.scores())
    return found


# Row-wise Adagrad keeps an accumulator per row of a shard, so columns are compared under Adagrad.
CASES = [(kind, "adagrad") for kind in [*KINDS, "data_parallel"]] + [
    (kind, "rowwise_adagrad") for kind in ("table_wise", "row_wise", "data_parallel")
]


@pytest.fixture(scope="module")
def one_rank() -> dict[tuple[str, str], Any]:
    return _scores_under_plans([("table_wise", "adagrad"), ("table_wise", "rowwise_adagrad")])


@pytest.fixture(scope="module")
def two_ranks() -> dict[tuple[str, str], Any]:
    return run_ranks(2, _scores_under_plans, CASES)[1]


@pytest.mark.parametrize(("kind", "optimizer"), CASES)
def test_start_and_training_do_not_depend_on_ranks_or_plan(
    kind: str, optimizer: str, one_rank: Any, two_ranks: Any
) -> None:
    start, trained = one_rank["table_wise", optimizer]
    other_start, other_trained = two_ranks[kind, optimizer]
    assert other_start == pytest.approx(start, abs=1e-6)
    assert other_trained == pytest.approx(trained, abs=1e-5)
    assert trained != pytest.approx(start, abs=1e-3)


@pytest.fixture(scope="module")
def job() -> Any:
    with start_runtime("cpu") as runtime:
        yield Job(runtime, "table_wise", tables={"user": 4000, "item": 4000})


def _values(job: Job, table: str) -> torch.Tensor:
    (shard,) = table_weights(job.model)[table].local_shards()
    return shard.tensor.clone()


def test_initial_weights_are_normal(job: Job) -> None:
    init_tables(job.model, seed=0, std=0.01)
    user = _values(job, "user") / 0.01
    assert user.shape == (4000, DIM)
    assert user.mean().item() == pytest.approx(0, abs=0.02)
    assert user.std().item() == pytest.approx(1, abs=0.02)
    assert (user.abs() > 1.96).float().mean().item() == pytest.approx(0.05, abs=0.005)
    assert torch.corrcoef(user.T).fill_diagonal_(0).abs().max() < 0.08


def test_initial_weights_differ_between_tables_and_seeds_only(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    init_tables(job.model, seed=0, std=1.0)
    first, item = _values(job, "user"), _values(job, "item")
    init_tables(job.model, seed=1, std=1.0)
    assert not torch.allclose(_values(job, "user"), first)
    assert not torch.allclose(item, first)
    monkeypatch.setattr(sharding, "_CELLS_AT_ONCE", 100)
    init_tables(job.model, seed=0, std=1.0)
    assert torch.equal(_values(job, "user"), first)


def test_quantised_communication_is_configured() -> None:
    (plain,) = make_sharders(DistributedConfig(), "cpu")
    (quantised,) = make_sharders(DistributedConfig(forward_precision="fp16"), "cpu")
    assert not plain.qcomm_codecs_registry
    assert quantised.qcomm_codecs_registry


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_small_gradients_are_not_lost_on_the_wire(precision: CommunicationPrecision) -> None:
    config = DistributedConfig(backward_precision=precision)
    gradient = torch.tensor([1e-8, -1e-7, 1e-3, 10.0])
    for device in ("cpu", "cuda"):
        (sharder,) = make_sharders(config, device)
        for codecs in sharder.qcomm_codecs_registry.values():
            received = codecs.backward.decode(codecs.backward.encode(gradient))
            assert received.tolist() == pytest.approx(gradient.tolist(), rel=0.01)
