"""The section `incremental`: training over the periods of a log in time order (docs/incremental.md)."""

from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from hetegen_rec.config.errors import Section
from hetegen_rec.config.values import as_tuple

Way: TypeAlias = Literal["finetune", "retrain", "fesail"]
IncrementalStage: TypeAlias = Literal["scratch", "joint"]
StalenessWeight: TypeAlias = Literal["inverse", "exponential"]

FEWEST_UPDATES = 2
"""Periods behind the first ones: one to go on with, and one to test that on."""


class StaleIdsConfig(Section):
    """Ids that training has not seen lately, and how far their table rows may move."""

    directory: str
    """Directory with the staleness of every id of every table, as `incremental` writes it."""
    regularisation: PositiveFloat
    """lambda: the table row of an id that was last seen s periods ago moves by 1 / (1 + lambda s) of what
    it would."""


class IncrementalConfig(Section):
    """How a log is cut into periods, and how a model follows them."""

    ways: Annotated[tuple[Way, ...], BeforeValidator(as_tuple)] = ("finetune", "retrain", "fesail")
    """`finetune` goes on from its last model with the new rows only; `retrain` starts from nothing on all
    rows so far; `fesail` goes on with the new rows and a replay of rows with stale ids."""
    stage: IncrementalStage = "scratch"
    """The stage that trains every model: clicks alone, or clicks and reconstruction. Its section under
    `stages` says how."""
    periods: PositiveInt = 8
    """Periods of about equally many rows."""
    period_length: PositiveInt | None = None
    """Periods of equal time instead: their length in the unit of the timestamp column."""
    first_periods: PositiveInt = 1
    """Periods on which the model is trained from nothing, once for all ways."""
    epochs: PositiveInt = 1
    """Passes over the rows of an update by `finetune` and `fesail`. The first model and `retrain` have the
    epochs of the stage."""
    valid_share: Annotated[float, Field(gt=0.0, le=0.5)] = 0.1
    """Newest share of a period that validates its model, and is trained on with the next period."""
    replay_rows: PositiveInt = 10_000
    """`fesail`: rows with stale ids that are trained on again, at most."""
    weight: StalenessWeight = "inverse"
    """`fesail`: worth of an id of staleness s in the choice of rows: 1 / s or exp(-s), plus `bias`."""
    bias: NonNegativeFloat = 0.1
    """`fesail`: see `weight`."""
    regularisation: NonNegativeFloat = 1.0
    """`fesail`: lambda of `stages.*.stale_ids`; 0 for replay alone."""

    @model_validator(mode="after")
    def _check(self) -> "IncrementalConfig":
        if not self.ways:
            raise ValueError("`ways` is empty; name at least one of finetune, retrain, fesail")
        if len(set(self.ways)) != len(self.ways):
            raise ValueError(f"`ways: [{', '.join(self.ways)}]` names a way twice")
        if self.period_length is not None:
            self._refuse_unused("with `period_length`", "periods")
        elif self.periods < self.first_periods + FEWEST_UPDATES:
            raise ValueError(
                f"`periods: {self.periods}` are too few for `first_periods: {self.first_periods}`: behind "
                "those come one to go on with and one to test on; use "
                f"{self.first_periods + FEWEST_UPDATES} or more"
            )
        if "fesail" not in self.ways:
            reason = f"with `ways: [{', '.join(self.ways)}]`"
            self._refuse_unused(reason, "replay_rows", "weight", "bias", "regularisation")
        return self
