from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from small_log import Log, make_model, model_config
from toy_model import Job, Toy

from hetegen_rec.config import ConfigError
from hetegen_rec.config.backbone import BackboneName
from hetegen_rec.config.run import StageConfig
from hetegen_rec.distributed.optimizers import (
    GatedOptimizer,
    attach_table_optimizer,
    make_optimizer,
    matrices,
)
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


VECTORS = {
    "context",
    "decoder_bias",
    "gain",
    "label_embedding.weight",
    "mask_vectors",
    "norm.bias",
    "place_embedding",
    "cross.bias.0",
    "cross.bias.1",
    "cross.bias.2",
}
"""How parameters of two dimensions end that are no matrices, in all models."""
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"backbone": {"name": name}} for name in get_args(BackboneName)},
    "generated": {"backbone": {"name": "dcnv2", "generate": True, "rank": 2}},
    "mlp head": {"ctr": {"head": "mlp"}, "backbone": {"generate": True}},
    "masked features": {"objective": {"name": "masked_features"}},
    "replaced features": {"objective": {"name": "replaced_features"}},
}


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_every_parameter_of_two_dimensions_is_a_matrix_or_a_known_vector(settings: dict[str, Any]) -> None:
    network = make_model(Log(64), "joint", model_config(**settings)).network
    named = {name: p for name, p in network.named_parameters() if not name.endswith("difficulty")}
    decayed = matrices(network, named)
    assert decayed
    for name, parameter in named.items():
        is_vector = parameter.ndim < 2 or name.endswith(tuple(f".{end}" for end in VECTORS))
        assert (name in decayed) != is_vector, name


def _with_a_gain(job: Job, stage: StageConfig) -> Job:
    """The toy with gains and a bias of several fields, [F, D]."""
    job.model.module.norm = torch.nn.ParameterDict({"gain": torch.ones(3, 4), "bias": torch.ones(3, 4)})
    job.optimizer = make_optimizer(job.model, stage, "rowwise_adagrad", 0.05)
    return job


def test_gains_and_biases_of_several_fields_are_not_decayed(runtime: Runtime) -> None:
    stage = StageConfig(dense_lr=0.1, weight_decay=0.5)
    job = _with_a_gain(Job(runtime, "table_wise", stage=stage), stage)
    for parameter in job.model.module.norm.values():
        parameter.grad = torch.zeros_like(parameter)
    job.optimizer.step()
    after = _parameters(job)
    assert torch.equal(after["norm.gain"], torch.ones(3, 4))
    assert torch.equal(after["norm.bias"], torch.ones(3, 4))


def test_state_loads_whatever_was_decayed(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "hetegen_rec.distributed.optimizers.matrices",
            lambda _, parameters: {name for name, p in parameters.items() if p.ndim >= 2},
        )
        before = _with_a_gain(Job(runtime, "table_wise"), StageConfig(weight_decay=0.1))
    before.optimizer.state_dict()["state"]["norm.gain"]["exp_avg"].fill_(3.0)
    job = _with_a_gain(Job(runtime, "table_wise"), StageConfig(weight_decay=0.1))
    job.optimizer.load_state_dict(before.optimizer.state_dict())
    assert (job.optimizer.state_dict()["state"]["norm.gain"]["exp_avg"] == 3.0).all()


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
