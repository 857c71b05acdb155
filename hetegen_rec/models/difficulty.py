"""Per-field difficulty: one learnable scalar a field, and the forms of balancing that use it.

The loss of every form is

    L = (1/F) sum_f sg[w_f] x_f + sum_f calibration(s_f, sg[x_f])

with x_f the field's loss. The first term trains the network, the second only moves the scalars, so
the two never compete (docs/method.md section 5; the default form is derived there, because the form
reported for HeteGenCTR, arXiv 2605.24986, lowers the weight of a field as it gets harder).

Losses are reduced over all ranks before they arrive here, so every rank holds the same scalars.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hetegen_rec.config.run import BalanceConfig, BalanceForm

_MIN_RELATIVE = 1e-3
_FLOOR = 0.1
_SLOW = 0.1
_DWA_WINDOW = 100
_DWA_TEMPERATURE = 2.0
_PROBE_MEMORY = 0.9


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
    """[F]: cross-entropy of the marginal distribution."""

    @property
    def relative(self) -> Tensor:
        """[F, K]: r = (l + 1e-3) / c, about 1 for an untrained model."""
        return (self.cross_entropy + _MIN_RELATIVE) / self.chance[:, None]

    @property
    def seen(self) -> Tensor:
        """[F, K] bool: cells with targets; the others are skipped."""
        return self.share > 0

    @property
    def per_field(self) -> Tensor:
        """[F]: cross-entropy over all bins."""
        return (self.cross_entropy * self.share).sum(1)


@dataclass
class Probe:
    """Gradients on the last shared weight, measured now and then; equal on all ranks."""

    norms: Tensor
    """[F]: norm of the gradient of each field's loss x_f."""
    alignment: Tensor
    """[F]: cosine with the gradient of the click loss, in [-1, 1]."""


class Difficulty(nn.Module):
    """Difficulty scalars, weights and attention gains under one balancing form.

    `difficulty` [F, K] is the replicated parameter s (K = 1 but for `conditional`), 0 at first.
    It tracks log r_f under every form that does not define another equilibrium, so that the
    diagnostics are comparable.
    """

    moving: Tensor
    window_sum: Tensor
    window_mean: Tensor
    window_ratio: Tensor
    window_steps: Tensor
    probe_norms: Tensor
    probe_alignment: Tensor

    def __init__(self, num_fields: int, config: BalanceConfig) -> None:
        super().__init__()
        self.config = config
        self.form: BalanceForm = config.form
        self.num_bins = config.noise_bins if config.form == "conditional" else 1
        self.difficulty = nn.Parameter(torch.zeros(num_fields, self.num_bins))
        self.register_buffer("moving", torch.ones(num_fields, 2))
        self.register_buffer("window_sum", torch.zeros(num_fields))
        self.register_buffer("window_mean", torch.ones(num_fields))
        self.register_buffer("window_ratio", torch.ones(num_fields))
        self.register_buffer("window_steps", torch.zeros(()))
        self.register_buffer("probe_norms", torch.ones(num_fields))
        self.register_buffer("probe_alignment", torch.ones(num_fields))

    @property
    def needs_probe(self) -> bool:
        """Whether this form wants per-field gradients now and then."""
        return self.form in ("aligned", "gradnorm")

    @property
    def uses_raw_loss(self) -> bool:
        """Whether x_f is the cross-entropy itself rather than the loss relative to chance."""
        return self.form in ("literal", "uncertainty")

    def weights(self) -> Tensor:
        """w [F, K], no gradient; the mean over fields is 1 but for `literal` and `uncertainty`."""
        s = self.difficulty.detach()
        if self.uses_raw_loss:
            return torch.exp(-s)
        return _normalised(self._raw_weights(s))

    def _raw_weights(self, s: Tensor) -> Tensor:
        if self.form in ("difficulty", "conditional"):
            return torch.exp(self.config.exponent * (s - s.max()))
        if self.form == "informative":
            level = torch.exp(s).clamp(max=1.0)
            return (level * (1.0 - level)).clamp(min=_FLOOR / 4)
        if self.form == "progress":
            gain = (self.moving[:, 1] - self.moving[:, 0]).clamp(min=0.0)
            return (gain + _FLOOR * gain.mean() + torch.finfo(gain.dtype).tiny)[:, None]
        if self.form == "aligned":
            return self.probe_alignment.clamp(min=_FLOOR)[:, None]
        if self.form == "dwa":
            return torch.exp(self.window_ratio / _DWA_TEMPERATURE)[:, None]
        if self.form == "gradnorm":
            return torch.exp(s - s.max())
        return torch.ones_like(s)

    def gain(self) -> Tensor:
        """g [F]: gain of attention, sqrt(w), 1 at the start and for forms that do not guide it."""
        if self.form == "literal":
            return torch.exp(-self.difficulty.detach() / 2).mean(1)
        if self.form == "uncertainty":
            return torch.ones_like(self.difficulty[:, 0])
        return self.weights().mean(1).sqrt()

    def key_bias(self) -> Tensor:
        """s_f - mean s, [F]: the additive bias of keys."""
        s = self.difficulty.detach().mean(1)
        return s - s.mean()

    def losses(self, losses: FieldLosses) -> Tensor:
        """x [F, K]: the losses that this form weights."""
        return losses.cross_entropy if self.uses_raw_loss else losses.relative

    def calibration(self, losses: FieldLosses) -> Tensor:
        """The scalar loss that moves s. Its gradient never reaches the network."""
        s = self.difficulty
        x = self.losses(losses).detach()
        if self.uses_raw_loss:
            terms = torch.exp(-s) * x + s / 2
        elif self.form == "gradnorm":
            terms = self._gradnorm_terms(losses)
        elif self.form == "informative":
            level = (losses.cross_entropy + _MIN_RELATIVE) / losses.baseline[:, None]
            terms = torch.exp(-s) * level.detach() + s
        else:
            terms = torch.exp(-s) * x + s
        return torch.where(losses.seen, terms, 0.0).sum()

    def _gradnorm_terms(self, losses: FieldLosses) -> Tensor:
        """|G_f - mean G (x_f / mean x)^alpha| (Chen et al., ICML 2018), the right side constant."""
        norms = _normalised(torch.exp(self.difficulty))[:, 0] * self.probe_norms
        rate = losses.relative[:, 0].detach()
        target = norms.detach().mean() * (rate / rate.mean()) ** self.config.exponent
        return (norms - target).abs()[:, None]

    @torch.no_grad()
    def observe(self, losses: FieldLosses, probe: Probe | None) -> None:
        """Updates the moving averages of forms that look at how losses change."""
        seen = losses.seen.any(1)
        relative = (losses.relative * losses.share).sum(1)
        rates = relative.new_tensor([self.config.learning_rate, self.config.learning_rate * _SLOW])
        moved = self.moving + rates * (relative[:, None] - self.moving)
        self.moving.copy_(torch.where(seen[:, None], moved, self.moving))
        if self.form == "dwa":
            self._observe_window(relative, seen)
        if probe is not None:
            memory = _PROBE_MEMORY
            self.probe_norms.mul_(memory).add_(probe.norms, alpha=1 - memory)
            self.probe_alignment.mul_(memory).add_(probe.alignment, alpha=1 - memory)

    def _observe_window(self, relative: Tensor, seen: Tensor) -> None:
        """Dynamic weight average (Liu et al., CVPR 2019) over windows of steps instead of epochs."""
        self.window_sum.add_(torch.where(seen, relative, self.window_mean))
        self.window_steps.add_(1)
        is_full = self.window_steps >= _DWA_WINDOW
        mean = self.window_sum / self.window_steps
        self.window_ratio.copy_(torch.where(is_full, mean / self.window_mean, self.window_ratio))
        self.window_mean.copy_(torch.where(is_full, mean, self.window_mean))
        self.window_sum.mul_(~is_full)
        self.window_steps.mul_(~is_full)


def _normalised(weights: Tensor) -> Tensor:
    """Scales weights to a mean of 1: the budget is conserved."""
    return weights / weights.mean()
