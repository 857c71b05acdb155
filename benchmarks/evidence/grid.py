"""The grid of one YAML file: data sets, methods, seeds, and the search that every method gets."""

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field, PositiveInt, ValidationError, model_validator

from hetegen_rec.config.errors import ConfigError, Section
from hetegen_rec.config.incremental import IncrementalStage, Way
from hetegen_rec.config.loading import explain, read_yaml
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


class Peer(Section):
    """Figures of test that were measured elsewhere, copied to be shown; no test of significance sees them."""

    source: str
    """Where they stand, and what they are means of."""
    auc: float | None = None
    gauc: float | None = None
    log_loss: float | None = None
    cold_users: float | None = None
    """AUC on the slice of that name, as `tail_items`."""
    tail_items: float | None = None


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
    groups: list[str] | None = None
    """The groups of methods that run on it; null for all."""
    peers: dict[str, Peer] = {}
    """Figures of others on the same rows, by name."""


class Method(Section):
    """A row of the tables."""

    title: str
    group: str | None = None
    """One of the grid's groups; null if it has none."""
    stages: list[Stage] = []
    """`[scratch]`, `[joint]` or `[pretrain, finetune]`."""
    overrides: Overrides = {}
    """What makes it this method."""
    of: str | None = None
    """Another method, whose trained models it only scores with in another way: with the same seeds and the
    same settings of the search."""
    evaluate: Overrides = {}
    """The other way; with `of` only."""
    settings_of: str | None = None
    """Another method, whose settings of the search it takes over instead of searching: for ablations."""
    only: list[str] | None = None
    """The data sets that it can run on; null for all."""
    seeds: PositiveInt | None = None
    """How many; null for as many as the grid has."""

    @model_validator(mode="after")
    def _check(self) -> "Method":
        if self.of is not None:
            self._check_strategy()
        elif self.stages not in _WAYS:
            ways = " or ".join(f"[{', '.join(way)}]" for way in _WAYS)
            raise ValueError(f"`stages: [{', '.join(self.stages)}]` must be {ways}")
        elif self.evaluate:
            raise ValueError(
                "`evaluate` needs `of`: the method whose trained models it scores with. What a method trains "
                "and scores with belongs into `overrides`"
            )
        return self

    def _check_strategy(self) -> None:
        if self.stages or self.overrides or self.settings_of:
            raise ValueError(
                f"`of: {self.of}` brings `stages`, `overrides` and the settings of the search; leave them out"
            )
        if not self.evaluate:
            raise ValueError(f"`of: {self.of}` without `evaluate` would be the same method again")

    @property
    def click_stage(self) -> Stage:
        """The stage that scores, of a method that trains."""
        return self.stages[-1]

    def epochs(self, budget: Budget) -> Overrides:
        """The share of the budget of a method that trains, stage by stage."""
        if len(self.stages) == 1:
            return {f"stages.{self.click_stage}.epochs": budget.total}
        return {
            "stages.pretrain.epochs": budget.pretrain,
            f"stages.{self.click_stage}.epochs": budget.total - budget.pretrain,
        }


class Contest(Section):
    """Two sides; on each data set the best of each by AUC on valid meet on test."""

    ours: Annotated[list[str], Field(min_length=1)]
    """Groups of methods."""
    baselines: Annotated[list[str], Field(min_length=1)]
    """Groups of methods."""


class Incremental(Section):
    """Models that follow logs period after period, trained by `hetegen incremental` (docs/incremental.md)."""

    seeds: PositiveInt
    """Seeds 0 to this, exclusive; one run a data set and seed trains all ways."""
    baseline: Way = "finetune"
    """The way that the others are held against."""
    stage: IncrementalStage = "scratch"
    """`incremental.stage` of the runs. The first model and `retrain` have `epochs.total` of the data set."""
    overrides: Overrides = {}
    """For all of them, `incremental.KEY` among others; nothing is searched."""
    data_sets: Annotated[dict[str, Overrides], Field(min_length=1)]
    """Those of the grid that are followed, by name, each with its own overrides."""


class Grid(Section):
    """Data sets x methods x seeds."""

    seeds: PositiveInt
    """Seeds 0 to this, exclusive. The search looks at seed 0."""
    baseline: str
    """The method that the others are held against."""
    groups: dict[str, str] = {}
    """Titles of groups of methods, by name, in the order of the page; empty for one block of all methods."""
    contest: Contest | None = None
    """Which groups meet as a whole; null for no such section."""
    choices: dict[str, list[str]] = {}
    """Methods that differ in one thing, by what it is; each list is ranked by itself on valid."""
    overrides: Overrides = {}
    """For every run."""
    data_sets: Annotated[dict[str, DataSet], Field(min_length=1)]
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    incremental: Incremental | None = None
    """Null if no log is followed."""

    @model_validator(mode="after")
    def _check(self) -> "Grid":
        _known([self.baseline], self.methods, "baseline")
        for name, method in self.methods.items():
            self._check_method(name, method)
        for name, data_set in self.data_sets.items():
            _known(data_set.groups or (), self.groups, f"data_sets.{name}.groups")
        for choice, methods in self.choices.items():
            _known(methods, self.methods, f"choices.{choice}")
        if self.contest is not None:
            _known(self.contest.ours, self.groups, "contest.ours")
            _known(self.contest.baselines, self.groups, "contest.baselines")
        if self.incremental is not None:
            _known(self.incremental.data_sets, self.data_sets, "incremental.data_sets")
        return self

    def _check_method(self, name: str, method: Method) -> None:
        _known(method.only or (), self.data_sets, f"methods.{name}.only")
        if method.group is not None or self.groups:
            _known([str(method.group)], self.groups, f"methods.{name}.group")
        limit = self.seeds
        training = {other: one for other, one in self.methods.items() if one.of is None}
        if method.settings_of is not None:
            searching = [other for other, one in training.items() if one.settings_of is None]
            _known([method.settings_of], searching, f"methods.{name}.settings_of")
        if method.of is not None:
            _known([method.of], training, f"methods.{name}.of")
            limit = self.seeds_of(method.of)
        if method.seeds is not None and method.seeds > limit:
            raise ValueError(f"`methods.{name}.seeds: {method.seeds}` is above the {limit} that there are")

    def runs_on(self, method: str, data_set: str) -> bool:
        """Whether a method runs on a data set."""
        one, where = self.methods[method], self.data_sets[data_set]
        needed = one.of or one.settings_of
        return (
            (one.only is None or data_set in one.only)
            and (where.groups is None or one.group in where.groups)
            and (needed is None or self.runs_on(needed, data_set))
        )

    def methods_of(self, data_set: str) -> list[str]:
        """The methods that run on a data set."""
        return [method for method in self.methods if self.runs_on(method, data_set)]

    def members(self, groups: Iterable[str]) -> list[str]:
        """The methods of some groups, one group after the other."""
        return [name for group in groups for name, method in self.methods.items() if method.group == group]

    def seeds_of(self, method: str) -> int:
        """How many seeds a method has."""
        one = self.methods[method]
        return one.seeds or (self.seeds if one.of is None else self.seeds_of(one.of))

    def trained(self, method: str) -> str:
        """The method that trains what a method scores with: mostly itself."""
        return self.methods[method].of or method

    def searched(self, method: str) -> str:
        """The method whose search decides about the settings of a method: mostly itself."""
        trained = self.trained(method)
        return self.methods[trained].settings_of or trained


def _known(names: Iterable[str], known: Collection[str], key: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"`{key}: {name}` is none of: {', '.join(known) or 'nothing'}")


def load_grid(path: str | Path) -> Grid:
    """Reads a grid.

    Raises:
        ConfigError: no such file, or not a grid; the message names the key.
    """
    try:
        return Grid.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(explain(error, str(path), Grid)) from error


def as_arguments(overrides: Overrides, click_stage: Stage) -> list[str]:
    """`key=value` strings as the command line takes them, `click.` replaced by the stage's section."""
    return [f"{_expand(key, click_stage)}={_text(value)}" for key, value in overrides.items()]


def _expand(key: str, click_stage: Stage) -> str:
    return f"stages.{click_stage}.{key.removeprefix(_CLICK)}" if key.startswith(_CLICK) else key


def _text(value: Any) -> str:
    # Text passes as it is, to be read as YAML again.
    return value if isinstance(value, str) else json.dumps(value)
