"""How the difficulty of the fields balances their reconstruction losses."""

from typing import Literal, TypeAlias

from pydantic import Field, PositiveInt, model_validator

from hetegen_rec.config.errors import Section

BalanceForm: TypeAlias = Literal[
    "uniform",
    "literal",
    "difficulty",
    "informative",
    "learnable",
    "progress",
    "aligned",
    "conditional",
    "uncertainty",
    "dwa",
    "gradnorm",
]


class BalanceConfig(Section):
    """How the per-field reconstruction losses are weighted (docs/method.md section 5)."""

    form: BalanceForm = "learnable"
    exponent: float = 1.0
    """`difficulty` and `conditional`: g in w_f ~ exp(g s_f); `gradnorm`: its alpha."""
    learning_rate: float = Field(0.05, gt=0.0, lt=1.0)
    """Step size of the difficulty scalars (SGD): the inverse of their memory in steps."""
    probe_every: PositiveInt = 10
    """`aligned` and `gradnorm` only: steps between two probes of the per-field gradients."""
    noise_bins: PositiveInt = 4
    """`conditional` only: bins of the noise level t."""

    @model_validator(mode="after")
    def _check(self) -> "BalanceConfig":
        if self.form not in ("difficulty", "conditional", "gradnorm"):
            self._refuse_unused(f"with `form: {self.form}`", "exponent")
        if self.form != "conditional":
            self._refuse_unused(f"with `form: {self.form}`", "noise_bins")
        if self.form not in ("aligned", "gradnorm"):
            self._refuse_unused(f"with `form: {self.form}`", "probe_every")
        return self
