"""Warm-up and decay of the learning rates, for fused table optimizers and dense ones alike."""

import math
from typing import Any, Literal

from torchrec.optim.keyed import KeyedOptimizer

Decay = Literal["none", "linear", "cosine"]


def rate_factor(step: int, total_steps: int, warmup: float, decay: Decay) -> float:
    """The share of its base that a learning rate has at a step.

    It rises linearly over the first `warmup * total_steps` steps, reaches one, then stays (`none`) or
    falls to zero at `total_steps`.

    Args:
        step: steps taken before this one, from 0.
        total_steps: steps of the stage.
        warmup: share of the steps that warm up, in [0, 1].
        decay: form of the fall.
    """
    warmup_steps = math.ceil(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay == "none":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - progress if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


class LearningRates:
    """Sets the rate of every parameter group from the number of steps taken, its only state.

    Fused optimizers take their rate over in `zero_grad()`, dense ones in `step()`: call `advance()` after
    a step and before the next `zero_grad()`. Groups with `scheduled: False` keep their rate.
    """

    def __init__(
        self, optimizer: KeyedOptimizer, total_steps: int, warmup: float, decay: Decay, step: int = 0
    ) -> None:
        """Takes the groups' present rates as their bases, and sets the rates of a step.

        Args:
            optimizer: from `make_optimizer`.
            total_steps: steps of the stage.
            warmup: share of the steps that warm up.
            decay: form of the fall after it.
            step: steps taken so far.
        """
        self._groups: list[dict[str, Any]] = list(optimizer.param_groups)
        self._bases = [float(group["lr"]) for group in self._groups]
        self._total_steps = total_steps
        self._warmup = warmup
        self._decay: Decay = decay
        self._step = step
        self._apply()

    def advance(self) -> None:
        """Moves on by one step."""
        self._step += 1
        self._apply()

    def by_name(self) -> dict[str, float]:
        """The present rate of each kind of parameter: `tables`, `dense`, `difficulty`."""
        return {group.get("name", "tables"): group["lr"] for group in self._groups}

    def _apply(self) -> None:
        factor = rate_factor(self._step, self._total_steps, self._warmup, self._decay)
        for group, base in zip(self._groups, self._bases, strict=True):
            if group.get("scheduled", True):
                group["lr"] = base * factor
