"""Training steps whose loss or gradient is not finite: found in time, told of, left out or the end."""

import logging
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import KeyedTensor
from torchrec.optim.keyed import KeyedOptimizer

from hetegen_rec.config.run import TrainConfig
from hetegen_rec.config.schema import Schema
from hetegen_rec.distributed.optimizers import GatedOptimizer
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.models.network import ClickNetwork, Outputs
from hetegen_rec.models.reduction import sum_over_ranks
from hetegen_rec.training.findings import MAX_SQUARED_NORM, Evidence, Finding, find, tell

logger = logging.getLogger(__name__)


class NonFiniteError(ArithmeticError):
    """Training met a loss or gradient that is not finite. The message says in which step and rows."""


class _Verdict:
    """A flag on its way from the device to the host."""

    def __init__(self, flag: Tensor) -> None:
        self._flag = flag.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if flag.is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._flag)


@dataclass
class _Step:
    """What is kept of a step until it is known to be finite; the last three come with the backward pass."""

    loss: Tensor
    outputs: Outputs
    widths: dict[str, int]
    """Columns of the looked-up rows and of their gradient, by token key."""
    looked_up: Tensor
    """[B, sum of widths]"""
    gradient: Tensor | None = None
    """[B, sum of widths]"""
    norms: dict[str, Tensor] = field(default_factory=dict)
    verdict: _Verdict | None = None

    def is_bad(self) -> bool:
        """Whether it is not finite. Waits for the device."""
        assert self.verdict is not None  # the backward pass came to the tables
        return self.verdict.wait()

    def evidence(self) -> Evidence:
        """For a search."""
        assert self.gradient is not None
        return Evidence(
            self.outputs, self.loss, self._by_key(self.looked_up), self._by_key(self.gradient), self.norms
        )

    def _by_key(self, values: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.widths, torch.split(values, list(self.widths.values()), dim=1), strict=True))


class NumericalGuard:
    """Watches the training steps of a network for losses and gradients that are NaN, infinite or overflowing.

    The verdict on a step falls in its backward pass, when the gradient of the looked-up rows is there: all
    gradients of the network are, too, and no table has been updated yet.

    `stop`: each rank judges by its own rows and raises its `flag`. The trainer lets the ranks agree on the
    flags and calls `report` on all of them, which ends training. No communication and no wait for the device,
    where a flag is one step late. Nothing is held back, so what is in memory may be spoilt: call `settle`
    and agree before anything is saved or evaluated.

    `skip`: the ranks agree within the backward pass, by one number, and wait for the device once a step. A
    step that is not finite on any rank changes on no rank

    - tables and their optimizer state. They receive gradients of zero, which change no bit under SGD,
      Adagrad and row-wise Adagrad. The optimizers with moments (Adam, partial row-wise Adam, LAMB; on CUDA
      only) take the step: moments of the rows looked up decay, and still move these rows;
    - other weights, data-parallel tables and difficulty among them, and their optimizer state;
    - the moving averages of the form of balancing.

    Such a step counts as a step: its rows are not trained again in this epoch, the learning rates go on,
    and dropout has drawn its masks.
    """

    def __init__(self, network: ClickNetwork, schema: Schema, config: TrainConfig, runtime: Runtime) -> None:
        """Watches from now on.

        Args:
            network: the replicated part of a sharded model.
            schema: that it was built from.
            config: what to do with such a step, and how often.
            runtime: this process's view of the job.
        """
        self.skipped_steps = 0
        """Steps reported as skipped. Set it on resuming a stage: the budget is that of the whole stage."""
        self._network, self._schema, self._config, self._runtime = network, schema, config, runtime
        self._skips = config.on_non_finite == "skip"
        self._weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        self._averages: list[Tensor] = []
        self._step: _Step | None = None
        self._undecided: deque[tuple[int, _Step]] = deque()
        self._findings: list[Finding] = []
        network.register_forward_pre_hook(self._before_forward)
        network.register_forward_hook(self._after_forward)

    def gated(self, optimizer: KeyedOptimizer) -> KeyedOptimizer:
        """The optimizer to train with: under `skip`, one that sits out the steps that are not finite."""
        return GatedOptimizer(optimizer, lambda: not self._last_step.is_bad()) if self._skips else optimizer

    @property
    def flag(self) -> bool:
        """Whether this rank has something to report."""
        return bool(self._findings)

    def end_step(self, number: int) -> bool:
        """Takes note of the step that was just trained.

        Args:
            number: what reports call it; the same on all ranks.

        Returns:
            Whether it was taken: False if it was skipped, on all ranks alike.
        """
        step, self._step = self._last_step, None
        is_skipped = self._skips and step.is_bad()
        if is_skipped:
            self._restore_averages()
        self._undecided.append((number, step))
        waits = not self._skips and self._runtime.device.type == "cuda"
        self._decide(leave=1 if waits else 0)
        return not is_skipped

    def settle(self) -> None:
        """Waits until `flag` covers the last step."""
        self._decide(leave=0)

    def report(self) -> None:
        """Tells of what was found on any rank since the last report. A collective.

        With `skip`, of every step that was left out, as a warning.

        Raises:
            NonFiniteError: on every rank; with `skip`, once the budget is exceeded.
        """
        self.settle()
        found = [finding for findings in self._runtime.gather(self._findings) for finding in findings]
        self._findings = []
        for number in sorted({finding.step for finding in found}):  # `stop` ends with the first
            self._judge(tell([finding for finding in found if finding.step == number]))

    def _judge(self, text: str) -> None:
        if not self._skips:
            raise NonFiniteError(f"{text}. {self._advice()}; train.on_non_finite: skip leaves out such steps")
        self.skipped_steps += 1
        budget = self._config.max_skipped_steps
        if self.skipped_steps > budget:
            raise NonFiniteError(
                f"{text}. It is one more than the {budget} steps that may be skipped "
                f"(train.max_skipped_steps). {self._advice()}"
            )
        if self._runtime.is_main:
            logger.warning("%s. Skipped, as number %d of at most %d", text, self.skipped_steps, budget)

    def _advice(self) -> str:
        keys = [f"stages.{self._network.stage}.{key}" for key in ("table_lr", "dense_lr", "max_grad_norm")]
        precision = ", or with train.precision: fp32" if self._config.precision == "bf16" else ""
        return (
            f"Go on from the last checkpoint (--accept-changes) with a lower {keys[0]}, {keys[1]} or "
            f"{keys[2]}{precision}"
        )

    @property
    def _last_step(self) -> "_Step":
        assert self._step is not None  # a step was trained
        return self._step

    def _before_forward(self, network: nn.Module, _inputs: Any) -> None:
        if self._skips and network.training:
            self._averages = [buffer.clone() for buffer in self._network.difficulty.buffers()]

    def _restore_averages(self) -> None:
        for buffer, before in zip(self._network.difficulty.buffers(), self._averages, strict=True):
            buffer.copy_(before)

    def _after_forward(self, network: nn.Module, inputs: Any, result: tuple[Tensor, Outputs]) -> None:
        looked_up: KeyedTensor = inputs[0]
        values = looked_up.values()  # [B, sum of dims], of which autograd makes the tokens
        if not (network.training and values.requires_grad):
            return
        loss, outputs = result
        widths = dict(zip(looked_up.keys(), looked_up.length_per_key(), strict=True))
        self._step = _Step(loss.detach(), outputs, widths, values.detach())
        values.register_hook(partial(self._on_gradient, self._step))

    def _on_gradient(self, step: "_Step", gradient: Tensor) -> Tensor | None:
        """Judges a step by the gradient [B, sum of dims] on its way to the tables; may replace it."""
        # DDP may be averaging the weights' gradients right now, in place. What is not finite stays so; what
        # another rank spoilt is seen early, which does no harm.
        weights = {name: weight.grad for name, weight in self._weights.items() if weight.grad is not None}
        norms = torch.stack(torch._foreach_norm([*weights.values(), gradient]))
        is_bad = ~(step.loss.isfinite() & (norms.square().sum() < MAX_SQUARED_NORM))  # NaN is not less
        if self._skips:
            is_bad = sum_over_ranks(is_bad.int()) > 0
        step.gradient, step.norms = gradient, dict(zip(weights, norms[:-1], strict=True))
        step.verdict = _Verdict(is_bad)
        return gradient.masked_fill(is_bad, 0.0) if self._skips else None

    def _decide(self, leave: int) -> None:
        """Searches the undecided steps that turn out bad, but for the last few."""
        while len(self._undecided) > leave:
            number, step = self._undecided.popleft()
            if step.is_bad():
                evidence, fields = step.evidence(), self._network.fields
                self._findings.append(find(number, self._runtime.rank, evidence, self._schema, fields))
