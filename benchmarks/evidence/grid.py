"""The grid of one YAML file: data sets, methods, seeds, and the search that every method gets."""

import json
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import yaml
from pydantic import Field, PositiveInt, ValidationError, model_validator

from hetegen_rec.config.errors import ConfigError, Section
from hetegen_rec.config.run import Stage

Overrides: TypeAlias = dict[str, Any]
"""Values by dotted key of a run's configuration. `click.KEY` is KEY of whichever stage scores clicks."""

_CLICK = "click."
_WAYS: tuple[list[Stage], ...] = (["scratch"], ["joint"], ["pretrain", "finetune"])


class Budget(Section):
    """Epochs over the training rows, the same for every method."""

    total: PositiveInt
    """Of a method with one stage, and of both stages of the others together."""
    pretrain: PositiveInt
    """How many of them a method with two stages spends on pre-training."""

    @model_validator(mode="after")
    def _check(self) -> "Budget":
        if self.pretrain >= self.total:
            raise ValueError(
                f"`pretrain: {self.pretrain}` leaves none of `total: {self.total}` for fine-tuning"
            )
        return self


class DataSet(Section):
    """A column of the tables."""

    config: str
    """The configuration of a run, relative to the checkout."""
    files: str | None = None
    """Directory below the data root with train/, valid/ and test/; null if `config` brings its data."""
    epochs: Budget
    overrides: Overrides = {}
    """For all methods."""
    search: Annotated[dict[str, Overrides], Field(min_length=1)]
    """The settings that every method may choose among on valid, by name."""


class Method(Section):
    """A row of the tables."""

    title: str
    stages: list[Stage]
    """`[scratch]`, `[joint]` or `[pretrain, finetune]`."""
    overrides: Overrides = {}
    """What makes it this method."""
    evaluate: Overrides = {}
    """What differs only when it scores. Methods that differ in nothing else share one training."""
    only: list[str] | None = None
    """The data sets that it can run on; null for all."""

    @model_validator(mode="after")
    def _check(self) -> "Method":
        if self.stages not in _WAYS:
            ways = " or ".join(f"[{', '.join(way)}]" for way in _WAYS)
            raise ValueError(f"`stages: [{', '.join(self.stages)}]` must be {ways}")
        return self

    @property
    def click_stage(self) -> Stage:
        """The stage that scores."""
        return self.stages[-1]

    def epochs(self, budget: Budget) -> Overrides:
        """The method's share of the budget, stage by stage."""
        if len(self.stages) == 1:
            return {f"stages.{self.click_stage}.epochs": budget.total}
        return {
            "stages.pretrain.epochs": budget.pretrain,
            f"stages.{self.click_stage}.epochs": budget.total - budget.pretrain,
        }


class Grid(Section):
    """Data sets x methods x seeds."""

    seeds: PositiveInt
    """Seeds 0 to this, exclusive. The search looks at seed 0."""
    baseline: str
    """The method that the others are held against."""
    overrides: Overrides = {}
    """For every run."""
    data_sets: Annotated[dict[str, DataSet], Field(min_length=1)]
    methods: Annotated[dict[str, Method], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "Grid":
        if self.baseline not in self.methods:
            raise ValueError(f"`baseline: {self.baseline}` is none of: {', '.join(self.methods)}")
        for name, method in self.methods.items():
            for data_set in method.only or ():
                if data_set not in self.data_sets:
                    raise ValueError(f"`methods.{name}.only` names {data_set!r}, which is no data set here")
        return self

    def methods_of(self, data_set: str) -> list[str]:
        """The methods that run on a data set."""
        return [n for n, method in self.methods.items() if method.only is None or data_set in method.only]


def load_grid(path: str | Path) -> Grid:
    """Reads a grid.

    Raises:
        ConfigError: no such file, or not a grid; the message names the key.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return Grid.model_validate(values)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from error


def as_arguments(overrides: Overrides, click_stage: Stage) -> list[str]:
    """`key=value` strings as the command line takes them, `click.` replaced by the stage's section."""
    return [f"{_expand(key, click_stage)}={_text(value)}" for key, value in overrides.items()]


def _expand(key: str, click_stage: Stage) -> str:
    return f"stages.{click_stage}.{key.removeprefix(_CLICK)}" if key.startswith(_CLICK) else key


def _text(value: Any) -> str:
    # Text passes as it is: `1e-5` is text to YAML's own reader, and a number to that of a run.
    return value if isinstance(value, str) else json.dumps(value)
