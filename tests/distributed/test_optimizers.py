from collections.abc import Iterator

import pytest
import torch
from toy_model import Job, Toy

from hetegen_rec.config import ConfigError
from hetegen_rec.config.run import StageConfig
from hetegen_rec.distributed.optimizers import GatedOptimizer, attach_table_optimizer, make_optimizer
from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.distributed.sharding import table_weights


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with start_runtime("cpu") as runtime:
        yield runtime


def _parameters(job: Job) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in job.model.module.named_parameters()}


def test_groups_have_their_own_rates(runtime: Runtime) -> None:
    job = Job(runtime, "table_wise", stage=StageConfig(table_lr=0.25, dense_lr=0.01, weight_decay=0.1))
    rates = {(g.get("name", "tables"), g["lr"], g.get("weight_decay")) for g in job.optimizer.param_groups}
    assert rates == {
        ("tables", 0.25, None),
        ("difficulty", 0.05, 0),
        ("dense", 0.01, 0.1),
        ("dense", 0.01, 0.0),
    }


def test_decay_touches_matrices_only(runtime: Runtime) -> None:
    job = Job(runtime, "table_wise", stage=StageConfig(dense_lr=0.1, weight_decay=0.5))
    before = _parameters(job)
    job.optimizer.zero_grad()
    (job.model(job.rows).sum() * 0.0).backward()
    job.optimizer.step()
    after = _parameters(job)
    assert torch.allclose(after["score.weight"], 0.95 * before["score.weight"])
    assert torch.equal(after["score.bias"], before["score.bias"])
    assert torch.equal(after["difficulty"], before["difficulty"])


def test_state_is_there_before_the_first_step_and_weights_are_untouched(runtime: Runtime) -> None:
    job = Job(runtime, "table_wise", stage=StageConfig(weight_decay=0.5))
    state = job.optimizer.state_dict()["state"]
    assert {"step", "exp_avg", "exp_avg_sq"} == set(state["hidden.weight"])
    assert state["hidden.weight"]["step"].item() == 0
    torch.testing.assert_close(_parameters(job)["hidden.weight"], Toy().hidden.weight.detach())
    assert all(parameter.grad is None for parameter in job.model.module.parameters())


def test_difficulty_takes_plain_gradient_steps(runtime: Runtime) -> None:
    job = Job(runtime, "table_wise", stage=StageConfig(max_grad_norm=1e-3))
    job.optimizer.zero_grad()
    job.model(job.rows).sum().backward()
    job.optimizer.step()
    rows = len(job.labels)
    assert _parameters(job)["difficulty"].tolist() == pytest.approx([-0.05 * rows] * 3)


def test_frozen_parameters_stay(runtime: Runtime) -> None:
    job = Job(runtime, "table_wise")
    job.model.module.difficulty.requires_grad_(False)
    optimizer = make_optimizer(job.model, StageConfig(), "rowwise_adagrad", 0.05)
    assert "difficulty" not in optimizer.params


@pytest.mark.parametrize("sharding", ["table_wise", "data_parallel"])
def test_table_gradients_are_clamped(runtime: Runtime, sharding: str) -> None:
    job = Job(runtime, sharding, "sgd", stage=StageConfig(table_lr=1.0, max_grad_norm=0.01))

    def weights() -> torch.Tensor:
        table = table_weights(job.model)["user"]
        return (table if sharding == "data_parallel" else table.local_shards()[0].tensor).clone()

    before = weights()
    job.optimizer.zero_grad()
    (job.model(job.rows).sum() * 1e4).backward()
    job.optimizer.step()
    # Row 0 is looked up twice.
    assert (weights() - before)[1:].abs().max().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", ["adam", "partial_rowwise_adam", "lamb"])
def test_an_optimizer_without_cpu_kernel_names_key_and_alternatives(name: str) -> None:
    with pytest.raises(ConfigError, match=f"train.table_optimizer: {name}.*rowwise_adagrad, adagrad, sgd"):
        attach_table_optimizer(Toy().ebc, name, StageConfig(), "cpu")
    attach_table_optimizer(Toy().ebc, name, StageConfig(), "cuda")


@pytest.mark.parametrize("sharding", ["table_wise", "data_parallel"])
def test_a_large_epsilon_keeps_rows_with_small_gradients_near_their_start(
    runtime: Runtime, sharding: str
) -> None:
    moved = []
    for eps in (1e-8, 10.0):
        job = Job(runtime, sharding, stage=StageConfig(table_eps=eps, table_lr=0.1))
        table = table_weights(job.model)["user"]
        weights = table if sharding == "data_parallel" else table.local_shards()[0].tensor
        before = weights.clone()
        job.train(1)
        moved.append((weights - before).abs().max().item())
    assert moved[1] < 0.1 * moved[0]


def test_a_closed_gate_leaves_weights_and_state_as_they_are(runtime: Runtime) -> None:
    job = Job(runtime, "data_parallel")
    plain = job.optimizer
    open_at = iter([False, True])
    job.optimizer = GatedOptimizer(plain, lambda: next(open_at))

    def everything() -> dict[str, torch.Tensor]:
        state = job.optimizer.state_dict()["state"]
        found = {f"{key}/{name}": value for key, values in state.items() for name, value in values.items()}
        return _parameters(job) | {key: value.clone() for key, value in found.items()}

    before = everything()
    job.train(1)
    assert all(torch.equal(value, before[name]) for name, value in everything().items())
    job.train(1)
    assert not any(torch.equal(everything()[name], before[name]) for name in ("hidden.weight", "difficulty"))
    assert job.optimizer.state_dict()["state"].keys() == plain.state_dict()["state"].keys()
    assert job.optimizer.params.keys() == plain.params.keys()
    assert job.optimizer.param_groups == plain.param_groups
