"""The forms of balancing under one switch, `model.balance.form` (docs/method.md section 5.4)."""

import torch
from torch import Tensor

from hetegen_rec.config.balance import BalanceConfig, BalanceForm
from hetegen_rec.models.difficulty import Difficulty, FieldLosses, Probe

_FLOOR = 0.1
"""Least weight of a field, relative to the best, in forms that would give some fields none."""
_SLOWER = 0.1
_PROBE_MEMORY = 0.9
_DWA_WINDOW = 100
_DWA_TEMPERATURE = 2.0


class Exponential(Difficulty):
    """`difficulty`: w_f ~ exp(g s_f). Derived: g = +1 gives hard fields the budget, r_f / mean r."""

    def raw_weights(self) -> Tensor:
        """exp(g s), shifted for range."""
        return torch.exp(self.config.exponent * (self.scalars - self.scalars.max()))


class Conditional(Exponential):
    """`conditional`: the same per field and noise level t. Derived."""

    @classmethod
    def bins_of(cls, config: BalanceConfig) -> int:
        """As many as configured."""
        return config.noise_bins

    def over_targets(self, values: Tensor) -> Tensor:
        """At noise level t a share t of the cells are targets, and levels come equally often."""
        middles = torch.arange(self.num_bins, device=values.device) + 0.5
        return values @ (middles / middles.sum())


class Literal(Difficulty):
    """`literal`: exp(-s) l + s / 2, as reported for HeteGenCTR; weights fall with difficulty.

    Its total weight is not conserved and it is unbounded below as a loss vanishes; kept to compare.
    """

    uses_cross_entropy = True

    def weights(self) -> Tensor:
        """exp(-s), not normalised."""
        return torch.exp(-self.scalars)

    def calibration_terms(self, losses: FieldLosses) -> Tensor:
        """At rest at exp(-s) = 1 / (2 l)."""
        return self.towards(2.0 * losses.cross_entropy)


class Uncertainty(Literal):
    """`uncertainty`: homoscedastic uncertainty (Kendall et al., CVPR 2018) with s = log sigma^2.

    For cross-entropies its loss is that of `literal`; attention takes no notice of it.
    """

    def gain(self) -> Tensor:
        """1 for every field."""
        return torch.ones_like(self.scalars[:, 0])

    def key_bias(self) -> Tensor:
        """0 for every field."""
        return torch.zeros_like(self.scalars[:, 0])


class Informative(Difficulty):
    """`informative`: w ~ u (1 - u) with u the loss relative to the field's entropy. Derived.

    Neither a solved field nor one that its context says nothing about takes the budget.
    """

    def raw_weights(self) -> Tensor:
        """Largest at u = 1/2, with a floor."""
        level = torch.exp(self.scalars).clamp(max=1.0)
        return (4.0 * level * (1.0 - level)).clamp(min=_FLOOR)

    def calibration_terms(self, losses: FieldLosses) -> Tensor:
        """At rest at s = log u."""
        return self.towards(losses.against_baseline)


class Learnable(Difficulty):
    """`learnable`: w ~ r_f P(l_f < H_f), difficulty of what can be learnt at all. Derived.

    P is the probability that the field's expected loss lies below the entropy H_f of its values, under the
    normal law that a moving average of l_f / H_f follows. A field of noise stays at its entropy or above.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, num_fields: int, config: BalanceConfig) -> None:
        super().__init__(num_fields, config)
        self.register_buffer("mean", torch.ones(num_fields))
        self.register_buffer("variance", torch.zeros(num_fields))

    def raw_weights(self) -> Tensor:
        """r P, with a floor for P: a field that was not seen to be learnable yet may still be."""
        return torch.exp(self.scalars - self.scalars.max()) * self.probability()[:, None].clamp(min=_FLOOR)

    def probability(self) -> Tensor:
        """P [F]; 1/2 before the first step."""
        rate = self.config.learning_rate
        error = (self.variance * rate / (2.0 - rate)).sqrt()
        margin = (1.0 - self.mean) / error.clamp(min=torch.finfo(error.dtype).tiny)
        return torch.special.ndtr(margin)

    @torch.no_grad()
    def observe(self, losses: FieldLosses, probe: Probe | None) -> None:
        """Moves the exponentially weighted mean and variance of u of the fields that had targets."""
        rate = self.config.learning_rate
        change = losses.over_bins(losses.against_baseline) - self.mean
        variance = (1.0 - rate) * (self.variance + rate * change.square())
        seen = losses.seen.any(1)
        self.mean.copy_(torch.where(seen, self.mean + rate * change, self.mean))
        self.variance.copy_(torch.where(seen, variance, self.variance))


class Progress(Difficulty):
    """`progress`: w ~ how much a field's loss still falls (learning progress). Derived.

    Measured as the gap between a slow and a fast moving average of r.
    """

    averages: Tensor
    rates: Tensor

    def __init__(self, num_fields: int, config: BalanceConfig) -> None:
        super().__init__(num_fields, config)
        self.register_buffer("averages", torch.ones(num_fields, 2))
        fast = config.learning_rate
        self.register_buffer("rates", torch.tensor([fast, fast * _SLOWER]), persistent=False)

    def raw_weights(self) -> Tensor:
        """The gap, with a floor; equal weights while nothing moved yet."""
        gap = (self.averages[:, 1] - self.averages[:, 0]).clamp(min=0.0)
        return (gap + _FLOOR * gap.max() + torch.finfo(gap.dtype).tiny)[:, None]

    @torch.no_grad()
    def observe(self, losses: FieldLosses, probe: Probe | None) -> None:
        """Moves both averages of the fields that had targets."""
        relative = losses.over_bins(losses.relative)[:, None]
        moved = self.averages + self.rates * (relative - self.averages)
        self.averages.copy_(torch.where(losses.seen.any(1, keepdim=True), moved, self.averages))


class Aligned(Difficulty):
    """`aligned`: w ~ agreement of the field's gradient with that of clicks on shared weights. Derived."""

    wants_probe = True
    alignment: Tensor

    def __init__(self, num_fields: int, config: BalanceConfig) -> None:
        super().__init__(num_fields, config)
        self.register_buffer("alignment", torch.ones(num_fields))

    def raw_weights(self) -> Tensor:
        """The mean cosine, with a floor."""
        return self.alignment.clamp(min=_FLOOR)[:, None]

    @torch.no_grad()
    def observe(self, losses: FieldLosses, probe: Probe | None) -> None:
        """Averages over probes, of the fields that had targets."""
        if probe is not None and probe.alignment is not None:
            moved = self.alignment.lerp(probe.alignment, 1.0 - _PROBE_MEMORY)
            self.alignment.copy_(torch.where(losses.seen.any(1), moved, self.alignment))


class GradNorm(Difficulty):
    """`gradnorm` (Chen et al., ICML 2018): equal gradient norms, more for slow fields.

    Its alpha is `exponent`.
    """

    wants_probe = True
    norms: Tensor

    def __init__(self, num_fields: int, config: BalanceConfig) -> None:
        super().__init__(num_fields, config)
        self.register_buffer("norms", torch.ones(num_fields))

    def raw_weights(self) -> Tensor:
        """exp(s)."""
        return torch.exp(self.scalars - self.scalars.max())

    def calibration_terms(self, losses: FieldLosses) -> Tensor:
        """|w_f n_f - mean(w n) (r_f / mean r)^alpha|, the right side constant; over fields with targets."""
        seen = losses.seen.any(1)
        # The others' scalars stand in the mean of the weights, but do not move.
        scalars = torch.where(seen, self.difficulty[:, 0], self.scalars[:, 0])
        weights = torch.exp(scalars)
        weighted = weights / weights.mean() * self.norms
        rate = losses.over_bins(losses.relative).detach()
        target = _mean_of(weighted.detach(), seen) * (rate / _mean_of(rate, seen)) ** self.config.exponent
        return (weighted - target).abs()[:, None]

    @torch.no_grad()
    def observe(self, losses: FieldLosses, probe: Probe | None) -> None:
        """Averages over probes, of the fields that had targets."""
        if probe is not None:
            moved = self.norms.lerp(probe.norms, 1.0 - _PROBE_MEMORY)
            self.norms.copy_(torch.where(losses.seen.any(1), moved, self.norms))


class DynamicWeightAverage(Difficulty):
    """`dwa` (Liu et al., CVPR 2019): w ~ exp(ratio of the last two mean losses / 2).

    Means are over windows of 100 steps instead of epochs, since large logs are read once.
    """

    window_sum: Tensor
    window_steps: Tensor
    window_mean: Tensor
    ratio: Tensor

    def __init__(self, num_fields: int, config: BalanceConfig) -> None:
        super().__init__(num_fields, config)
        self.register_buffer("window_sum", torch.zeros(num_fields))
        self.register_buffer("window_steps", torch.zeros(()))
        self.register_buffer("window_mean", torch.ones(num_fields))
        self.register_buffer("ratio", torch.ones(num_fields))

    def raw_weights(self) -> Tensor:
        """Softmax of the ratios up to a factor."""
        return torch.exp(self.ratio / _DWA_TEMPERATURE)[:, None]

    @torch.no_grad()
    def observe(self, losses: FieldLosses, probe: Probe | None) -> None:
        """Adds a step to the window; a full one becomes the last. No wait for the device."""
        relative = losses.over_bins(losses.relative)
        self.window_sum.add_(torch.where(losses.seen.any(1), relative, self.window_mean))
        self.window_steps.add_(1)
        is_full = self.window_steps >= _DWA_WINDOW
        mean = self.window_sum / self.window_steps
        self.ratio.copy_(torch.where(is_full, mean / self.window_mean, self.ratio))
        self.window_mean.copy_(torch.where(is_full, mean, self.window_mean))
        self.window_sum.mul_(~is_full)
        self.window_steps.mul_(~is_full)


def _mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of values [F] over the chosen fields; 1 if there is none."""
    count = chosen.sum()
    return torch.where(count > 0, (values * chosen).sum() / count.clamp(min=1), 1.0)


FORMS: dict[BalanceForm, type[Difficulty]] = {
    "uniform": Difficulty,
    "literal": Literal,
    "difficulty": Exponential,
    "informative": Informative,
    "learnable": Learnable,
    "progress": Progress,
    "aligned": Aligned,
    "conditional": Conditional,
    "uncertainty": Uncertainty,
    "dwa": DynamicWeightAverage,
    "gradnorm": GradNorm,
}


def make_difficulty(num_fields: int, config: BalanceConfig) -> Difficulty:
    """The configured form for that many fields."""
    return FORMS[config.form](num_fields, config)
