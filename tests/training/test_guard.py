"""Steps that are not finite: what is said of them, and that a skipped one never was."""

import itertools
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from multirank import run_ranks
from one_thread import one_thread  # noqa: F401
from small_log import SCHEMA, Log, balance_of, build_model, column, model_config
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from hetegen_rec.config.run import DistributedConfig, StageConfig, TableConfig, TrainConfig
from hetegen_rec.data.batch import Batch
from hetegen_rec.distributed.optimizers import attach_table_optimizer, make_optimizer
from hetegen_rec.distributed.planning import agree_on_plan
from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.distributed.sharding import init_tables, shard_model, table_weights
from hetegen_rec.training.guard import NonFiniteError, NumericalGuard

ROWS = 64
STEPS = 3
POISONED = 2
"""The step that is spoilt, of `STEPS`."""
BAD_ROW = 1


class Run:
    """A sharded model of the small log on this rank, with or without a guard, and its batches."""

    def __init__(
        self,
        runtime: Runtime,
        policy: str | None = "skip",
        *,
        sharding: str = "table_wise",
        table_optimizer: Any = "rowwise_adagrad",
        pipeline: type[Any] = TrainPipelineSparseDist,
        budget: int = 10,
        form: str = "difficulty",
    ) -> None:
        keys = {"on_non_finite": policy} if policy else {}
        keys |= {"max_skipped_steps": budget} if policy == "skip" else {}
        train = TrainConfig.model_validate(keys)
        stage = StageConfig()
        distributed = DistributedConfig(tables={"default": TableConfig(sharding=(sharding,))})  # type: ignore[arg-type]
        self.log = Log(ROWS * (STEPS + 1))
        self.runtime = runtime
        balance = balance_of(form)
        model = build_model(
            SCHEMA, self.log.statistics, model_config(balance=balance), train, "joint", stage, 0
        )
        attach_table_optimizer(model.ebc, table_optimizer, stage, "cpu")
        plan = agree_on_plan(runtime, model, distributed, ROWS)
        self.network = model.network
        self.model = shard_model(model, plan, runtime, distributed).train()
        init_tables(self.model, 0, 0.1)
        self.optimizer = make_optimizer(self.model, stage, table_optimizer, 0.05)
        self.guard = NumericalGuard(self.network, SCHEMA, train, runtime) if policy else None
        optimizer = self.guard.gated(self.optimizer) if self.guard else self.optimizer
        self.pipeline = pipeline(self.model, optimizer, runtime.device)

    def batch(self, step: int) -> Batch:
        """This rank's share of the rows of a step."""
        count = ROWS // self.runtime.world_size
        start = step * ROWS + self.runtime.rank * count
        return self.log.batch(start, start + count, step=(step + 1) * count)

    def train(self, *batches: Batch) -> list[bool]:
        """One step a batch, numbered from 1; returns which were taken."""
        source = iter(batches)
        taken = []
        for number in range(1, len(batches) + 1):
            self.pipeline.progress(source)
            taken.append(self.guard.end_step(number) if self.guard else True)
        return taken

    def report(self) -> str:
        """What the guard raises."""
        assert self.guard
        with pytest.raises(NonFiniteError) as caught:
            self.guard.report()
        return str(caught.value)

    def state(self) -> dict[str, Tensor]:
        """This rank's part of all weights, averages and optimizer state."""
        found: dict[str, Tensor] = {}
        _collect({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, "", found)
        return found


def _collect(value: Any, path: str, found: dict[str, Tensor]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _collect(inner, f"{path}/{key}", found)
    elif isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            found[f"{path}@{shard.metadata.shard_offsets}"] = shard.tensor.detach().clone()
    elif isinstance(value, Tensor):
        found[path] = value.detach().clone()


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with start_runtime("cpu") as runtime:
        yield runtime


# --- ways to spoil a step ---


def _spoil_embedding(run: Run) -> None:
    table_weights(run.model)["item"].local_shards()[0].tensor[5, 2] = float("nan")


def _spoil_one_of_a_bag(run: Run) -> None:
    table_weights(run.model)["genres"].local_shards()[0].tensor[4] = float("inf")


def _spoil_weight(run: Run) -> None:
    run.network.denoiser.shared_weight.data[0, 0] = float("inf")


def _spoil_class(run: Run) -> None:
    reconstruction: Any = run.network.reconstruction
    reconstruction.full.classes["hour"].bias.data[0] = float("nan")


def _spoil_loss(run: Run) -> None:
    """Infinite by a constant, so that every gradient is finite."""

    def add(_module: nn.Module, _inputs: Any, result: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return result[0] + float("inf"), result[1]

    run.network.register_forward_hook(add, prepend=True)


def _spoil_token_gradient(run: Run, step: int = 1) -> None:
    """In one step, infinite for the token of `user` in one row; it reaches nothing but the table."""
    steps = itertools.count(1)

    def poison(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[BAD_ROW, column("user")] = float("inf")
        return gradient

    def attach(_module: nn.Module, _inputs: Any, result: tuple[Tensor, Tensor]) -> None:
        if next(steps) == step:
            result[0].register_hook(poison)

    run.network.assembly.register_forward_hook(attach)


def _spoil_weight_gradient(run: Run) -> None:
    """Finite, but its square is not."""
    run.network.ctr_head.get_parameter("first_order.weight").register_hook(lambda gradient: gradient + 1e25)


def _spoilt(batch: Batch) -> Batch:
    """The same rows, with a NaN that makes the loss of reconstructing `user` one."""
    log_prior = batch.log_prior.clone()
    log_prior[BAD_ROW, column("user")] = float("nan")
    return replace(batch, log_prior=log_prior)


_ITEM_5 = r"embeddings that were spoilt before, row 5 of table item \((history, )?item\)"
_CASES: dict[str, tuple[Callable[[Run], None], str, str]] = {
    # what is spoilt: how, what the message says, what it must not say
    "an embedding": (
        _spoil_embedding,
        rf"loss nan; in the terms click.*{_ITEM_5}; row ids 1\d\d\d",
        "weights",
    ),
    "one of a bag": (
        _spoil_one_of_a_bag,
        r"spoilt before, row 4 of table genres \(genres\); row ids",
        "item (",
    ),
    "a weight": (_spoil_weight, r"loss nan; in the terms click", "embeddings"),
    "a field": (
        _spoil_class,
        r"loss nan; in the terms generative, calibration; in the reconstruction of hour;",
        "click",
    ),
    "the loss alone": (_spoil_loss, r"Rank 0: loss inf\. ", "row ids"),
    "a row's gradient": (
        _spoil_token_gradient,
        rf"loss \d.*; gradients of the looked-up rows of user; row ids {1000 + BAD_ROW} \(1 of {ROWS} rows\)",
        "terms",
    ),
    "a weight's gradient": (
        _spoil_weight_gradient,
        r"loss \d+\.\d+; gradients of the weights ctr_head",
        "row ids",
    ),
}


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_the_message_names_step_place_and_culprit(runtime: Runtime, policy: str, case: str) -> None:
    spoil, said, unsaid = _CASES[case]
    run = Run(runtime, policy, budget=1)
    assert run.guard
    spoil(run)
    run.train(run.batch(0))
    assert run.guard.flag
    if policy == "skip":
        run.guard.skipped_steps = 1  # all that the budget has
    text = run.report()
    assert text.startswith(f"step 1 is not finite (epoch 0, behind {ROWS} rows of every lane). Rank 0: loss")
    assert not run.guard.flag
    assert re.search(said, text), text
    assert unsaid not in text.split("Go on from")[0]


def test_stop_tells_of_the_first_step_and_not_of_those_that_follow_from_it(runtime: Runtime) -> None:
    run = Run(runtime, "stop")
    run.train(run.batch(0), _spoilt(run.batch(1)), run.batch(2))
    text = run.report()
    assert text.startswith("step 2 is not finite")
    assert "on_non_finite: skip" in text


def test_sound_steps_raise_no_flag_and_report_nothing(runtime: Runtime) -> None:
    for policy in ("stop", "skip"):
        run = Run(runtime, policy)
        assert run.guard
        run.train(*map(run.batch, range(STEPS)))
        assert not run.guard.flag
        run.guard.report()
        assert run.guard.skipped_steps == 0


def test_skipped_steps_are_warned_of_and_counted_up_to_the_budget(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(runtime, "skip", budget=3)
    assert run.guard
    run.guard.skipped_steps = 1  # before the stage was resumed
    bad = _spoilt(run.batch(0))
    with caplog.at_level(logging.WARNING, "hetegen_rec.training.guard"):
        run.train(bad, run.batch(1), bad)
        run.guard.report()
    warnings = [
        record.getMessage() for record in caplog.records if record.name == "hetegen_rec.training.guard"
    ]
    assert [text[:6] for text in warnings] == ["step 1", "step 3"]
    assert "Skipped, as number 3 of at most 3" in warnings[1]
    run.train(bad)
    assert "one more than the 3 steps that may be skipped (train.max_skipped_steps)" in run.report()
    assert run.guard.skipped_steps == 4


def test_evaluation_is_not_watched(runtime: Runtime) -> None:
    run = Run(runtime, pipeline=TrainPipelineBase)
    assert run.guard
    run.train(run.batch(0))
    _spoil_weight(run)
    run.model.eval()
    with torch.no_grad():
        run.model(run.batch(1))
    run.guard.settle()
    assert not run.guard.flag


def test_the_gradient_of_any_weight_is_judged_before_the_tables_change(runtime: Runtime) -> None:
    run = Run(runtime, pipeline=TrainPipelineBase, budget=100)
    assert run.guard
    before = run.state()
    weights = [weight for weight in run.network.parameters() if weight.requires_grad]

    optimizer = run.guard.gated(run.optimizer)
    for number, weight in enumerate(weights):
        handle = weight.register_hook(lambda gradient: gradient * float("nan"))
        optimizer.zero_grad()
        run.model(run.batch(0))[0].backward()
        optimizer.step()
        run.guard.end_step(number)
        handle.remove()
    assert _changed(before, run.state()) == []
    assert len(weights) > 20


_SETTINGS: list[dict[str, Any]] = [
    {},
    {"loss_too": False},
    {"loss_too": False, "sharding": "row_wise"},
    {"pipeline": TrainPipelineBase, "table_optimizer": "sgd"},
    {"sharding": "row_wise", "table_optimizer": "adagrad"},
    {"sharding": "column_wise", "form": "progress"},
    {"sharding": "data_parallel", "form": "gradnorm"},
    {"form": "aligned"},
    {"form": "dwa"},
]


def _skip_on_last_rank(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A run that skips a step against one that never saw its rows, for each setting."""
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        torch.set_num_threads(1)
        return [_compare(runtime, **setting) for setting in settings]


def _compare(runtime: Runtime, loss_too: bool = True, **setting: Any) -> dict[str, Any]:
    run, reference = Run(runtime, "skip", **setting), Run(runtime, None, **setting)
    assert run.guard
    bad = run.batch(POISONED)
    if runtime.rank == runtime.world_size - 1 and loss_too:
        bad = _spoilt(bad)
    elif runtime.rank == runtime.world_size - 1:
        _spoil_token_gradient(run, POISONED)
    first = run.state()
    taken = run.train(run.batch(0), bad, run.batch(1))
    reference.train(run.batch(0), run.batch(1))
    run.guard.settle()
    flag = run.guard.flag
    run.guard.report()
    return {
        "flag": flag,
        "taken": taken,
        "skipped": run.guard.skipped_steps,
        "differs": _changed(reference.state(), run.state()),
        "trained": len(_changed(first, run.state())),
    }


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_skipped_step_leaves_no_trace_on_any_rank(num_ranks: int) -> None:
    for results in run_ranks(num_ranks, _skip_on_last_rank, _SETTINGS):
        for setting, result in zip(_SETTINGS, results, strict=True):
            assert result["differs"] == [], setting
            assert result["flag"]
            assert result["taken"] == [True, False, True]
            assert result["skipped"] == 1
            assert result["trained"] > 20


def _stop_on_last_rank() -> tuple[bool, str]:
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        run = Run(runtime, "stop")
        assert run.guard
        bad = run.batch(0)
        if runtime.rank == 1:
            bad = _spoilt(bad)
        run.train(bad)
        return bool(run.guard.flag), run.report()


def test_all_ranks_raise_the_same_error_when_one_is_spoilt() -> None:
    (_, first), (flag, second) = run_ranks(2, _stop_on_last_rank)
    assert flag
    assert first == second
    assert (
        "Rank 1: loss nan; in the terms generative, calibration; in the reconstruction of user; row ids"
        in first
    )
    assert "Rank 0" not in first  # its calibration is NaN as well, but none of its rows is to blame
