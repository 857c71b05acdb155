"""Per-field difficulty: one learnable scalar a field, shared by the loss and by attention.

The loss of every form of balancing is

    L = (1/F) sum_f sg[w_f] x_f  +  sum_f calibration(s_f, sg[x_f])

with x_f the field's loss (`literal` and `uncertainty` have the sum, as published). The first term trains
the network, the second only moves the scalars s, so the two never compete. That matters: if w and s were
minimised together, raising a field's loss could only lower its weight, the reverse of what HeteGenCTR
(arXiv 2605.24986) claims; docs/method.md section 5 has the argument and the derivation of the default form.

Losses are reduced over all ranks before they arrive here, so every rank holds the same scalars.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from hetegen_rec.config.balance import BalanceConfig

_MIN_CROSS_ENTROPY = 1e-3
_MAX_AGAINST_BASELINE = 2.0
"""More than the 1 that `informative` counts at most, so that noise around 1 keeps its mean."""


_Values = TypeVar("_Values", Tensor, float)


def relative_loss(cross_entropy: _Values, chance: _Values) -> _Values:
    """r = (l + 1e-3) / c."""
    return (cross_entropy + _MIN_CROSS_ENTROPY) / chance


@dataclass
class Probe:
    """Gradients on the last shared weight, measured now and then; equal on all ranks."""

    norms: Tensor
    """[F]: norm of the gradient of each field's relative loss, whatever its weight."""
    alignment: Tensor | None
    """[F]: cosine with the gradient of the label loss, in [-1, 1]; None if the label is not in the set."""

    @property
    def shares(self) -> Tensor:
        """[F]: each norm as a share of their sum; 0 where nothing has a gradient."""
        return self.norms / self.norms.sum().clamp(min=torch.finfo(self.norms.dtype).tiny)


@dataclass
class FieldLosses:
    """Reconstruction losses of the global batch, per field F and noise bin K; equal on all ranks."""

    cross_entropy: Tensor
    """[F, K] nats, mean over the targets; 0 where there are none."""
    share: Tensor
    """[F, K]: share of the field's targets that fall into the bin; 0 in total if there are none."""
    chance: Tensor
    """[F]: cross-entropy of a uniform guess."""
    baseline: Tensor
    """[F]: cross-entropy of the field's marginal distribution."""
    probe: Probe | None = None
    """Their gradients, in steps that measured them."""

    @property
    def relative(self) -> Tensor:
        """[F, K]: r, about 1 for an untrained model."""
        return relative_loss(self.cross_entropy, self.chance[:, None])

    @property
    def against_baseline(self) -> Tensor:
        """[F, K]: the loss relative to that of the field's marginal distribution, at most 2.

        The entropy of a nearly constant field is next to nothing; unbounded, the ratio would throw
        the field's scalar far up in one step.
        """
        ratio = (self.cross_entropy + _MIN_CROSS_ENTROPY) / self.baseline[:, None]
        return ratio.clamp(max=_MAX_AGAINST_BASELINE)

    @property
    def seen(self) -> Tensor:
        """[F, K] bool: cells with targets; the others are skipped."""
        return self.share > 0

    def over_bins(self, values: Tensor) -> Tensor:
        """Mean of values [F, K] over the bins by their share of targets, [F]."""
        return (values * self.share).sum(1)


class Difficulty(nn.Module):
    """Difficulty scalars, weights and attention gains; as it stands, the form `uniform`.

    `difficulty` [F, K] is the replicated parameter s, 0 at first (K = 1 for all forms but one). It
    settles at log r_f, a learnt moving average, also under forms that do not use it, so that the
    diagnostics of all forms can be compared. Forms override what they do differently.
    """

    wants_probe = False
    """Whether the form looks at per-field gradients now and then."""
    uses_cross_entropy = False
    """Whether x_f is the cross-entropy itself, summed over fields, rather than the loss relative to chance,
    of which the mean is taken."""

    def __init__(self, num_fields: int, config: BalanceConfig) -> None:
        super().__init__()
        self.config = config
        self.difficulty = nn.Parameter(torch.zeros(num_fields, self.bins_of(config)))

    @classmethod
    def bins_of(cls, config: BalanceConfig) -> int:  # noqa: ARG003 - for forms that override it
        """Noise bins K that the form tells apart."""
        return 1

    @property
    def num_bins(self) -> int:
        """K."""
        return self.difficulty.shape[1]

    @property
    def scalars(self) -> Tensor:
        """s [F, K] without gradient."""
        return self.difficulty.detach()

    def raw_weights(self) -> Tensor:
        """Weights [F, K] up to a common factor."""
        return torch.ones_like(self.scalars)

    def weights(self) -> Tensor:
        """w [F, K] with a mean of 1 over the targets, so that no form changes the size of the step."""
        raw = self.raw_weights()
        return raw / self.over_targets(raw).mean()

    def over_targets(self, values: Tensor) -> Tensor:
        """Mean of values [F, K] over the bins, by the share of a field's targets that is expected there."""
        return values.mean(1)

    def gain(self) -> Tensor:
        """g [F]: gain of attention, sqrt(w), 1 at the start."""
        return self.over_targets(self.weights()).sqrt()

    def key_bias(self) -> Tensor:
        """[F]: s_f - mean s, the additive bias of keys."""
        scalars = self.scalars.mean(1)
        return scalars - scalars.mean()

    def objective(self, losses: FieldLosses) -> Tensor:
        """x [F, K]: the losses that this form weights."""
        return losses.cross_entropy if self.uses_cross_entropy else losses.relative

    def calibration_terms(self, losses: FieldLosses) -> Tensor:
        """[F, K]: terms that move s to its equilibrium; here s = log r."""
        return self.towards(self.objective(losses))

    def towards(self, level: Tensor) -> Tensor:
        """[F, K]: terms whose SGD step makes e^s the moving average (1 - k) e^s + k level, k the step size.

        To first order in k that is the step of exp(-s) level + s. But that one has no bound where the level
        is far above e^s: a single batch could throw a solved field's scalar up for hundreds of steps.
        """
        rate = self.config.learning_rate
        step = torch.log1p(rate * (level.detach() * torch.exp(-self.scalars) - 1.0)) / rate
        return -step * self.difficulty

    def calibration(self, losses: FieldLosses) -> Tensor:
        """The scalar loss that moves s. Its gradient never reaches the network."""
        return torch.where(losses.seen, self.calibration_terms(losses), 0.0).sum()

    def observe(self, losses: FieldLosses, probe: Probe | None) -> None:
        """Takes note of a step, for forms that look at how losses or gradients change."""
