"""A scenario: one question, the variants that are compared, and the configuration of each."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from benchmarks.throughput.arithmetic import Typical
from benchmarks.throughput.before import Part
from benchmarks.throughput.click_log import LogConfig
from hetegen_rec.config.errors import ConfigError, Section
from hetegen_rec.config.loading import apply_override, explain, parse_config, read_yaml
from hetegen_rec.config.run import RunConfig, Stage
from hetegen_rec.config.values import Texts

Measure: TypeAlias = Literal["trainer", "end_to_end", "bare", "reader", "arrow", "fuxictr"]
"""What a variant times: the trainer's steps on batches made before, the trainer's steps on the reader, a bare
TorchRec loop on batches made before, the reader alone, Arrow decoding the same columns in one thread, or
FuxiCTR's steps on batches in memory, in a process of its own."""

SCENARIOS = Path(__file__).parent / "scenarios"
PROGRAMS = {"checkpoint": "benchmarks.checkpoint_pause", "export": "benchmarks.export_latency"}
"""Scenarios that time no steps, by name: modules with a `main` and options of their own."""

_UNUSED = "unused"  # paths of a run configuration that no benchmark opens


class Variant(Section):
    """One of the things that are compared."""

    name: str
    overrides: Texts = ()
    """`key=value` of a run configuration; keys that begin with `log.` are those of the generated log."""
    measure: Measure | None = None
    """Default: that of the scenario."""
    stage: Stage | None = None
    """Default: that of the scenario."""
    before: list[Part] = []
    """Parts of a step that are as they were before they were made fast."""
    against: str | None = None
    """The variant that its ratio is relative to; default: the first."""
    ranks: PositiveInt | None = None
    """Measured in jobs of their own with so many ranks of this host, each on a core of its own; all variants
    of a scenario, or none. Default: the ranks that the scenario runs on."""
    jobs: PositiveInt = 1
    """Where there are `ranks`: as many independent jobs of so many ranks side by side, of which the slowest
    counts. What they lose to each other is the machine's limit, not that of ranks that talk."""
    optional: bool = False
    """Measured with `--all` only: it needs much memory or time."""


class Scenario(Section):
    """The content of one file under `scenarios/`."""

    question: str
    """What the table answers, in one line."""
    goal: str = ""
    """What the ratios should be, in words."""
    measure: Measure = "trainer"
    stage: Stage = "scratch"
    typical: Typical = "median"
    """What stands for the steps of a repeat; `mean` where stalls belong to what is measured."""
    repeats: PositiveInt = 9
    """Rounds over all variants."""
    steps: PositiveInt = 16
    """Timed steps of each variant in a round."""
    warm_rounds: NonNegativeInt = 1
    """Rounds before the first one that counts."""
    limits: bool = False
    """Also measure, in every round, what memory and cores can do at most, and what a step needs of that."""
    log: dict[str, Any] = {}
    """The generated log (`LogConfig`)."""
    config: dict[str, Any] = {}
    """Sections of a run configuration; name, data and features follow from the log."""
    variants: list[Variant] = Field(min_length=1)
    """What is compared. Ratios are relative to the first where `against` names no other."""

    @model_validator(mode="after")
    def _check(self) -> "Scenario":
        names = [variant.name for variant in self.variants]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"`variants`: the name {name!r} stands twice")
        if self.variants[0].optional:
            raise ValueError("`variants`: the first is the base of the ratios and cannot be `optional`")
        bases = [variant.name for variant in self.variants if not variant.optional]
        for variant in self.variants:
            if variant.against is not None and variant.against not in bases:
                raise ValueError(
                    f"`variants`, {variant.name!r}: `against: {variant.against}` is no variant that is "
                    f"always measured; those are: {', '.join(bases)}"
                )
        if len({variant.ranks is None for variant in self.variants}) > 1:
            raise ValueError("`variants`: give `ranks` to all of them, or to none")
        for variant in self.variants:
            if variant.jobs > 1 and variant.ranks is None:
                raise ValueError(f"`variants`, {variant.name!r}: `jobs: {variant.jobs}` needs `ranks`")
        for key in ("name", "run_dir", "features"):
            if key in self.config:
                raise ValueError(f"`config.{key}` follows from `log`; remove it")
        return self


@dataclass(frozen=True)
class Case:
    """A variant with everything resolved."""

    name: str
    measure: Measure
    stage: Stage
    log: LogConfig
    config: RunConfig
    before: tuple[Part, ...]
    against: str
    ranks: int | None
    jobs: int = 1


def load_scenario(name_or_path: str) -> Scenario:
    """Reads a scenario by its name, or from a file that ends in `.yaml`.

    Raises:
        ConfigError: there is none of that name, or a key is wrong; the message names it.
    """
    path = Path(name_or_path) if name_or_path.endswith(".yaml") else SCENARIOS / f"{name_or_path}.yaml"
    if not path.exists():
        known = ", ".join(sorted([*PROGRAMS, *(one.stem for one in SCENARIOS.glob("*.yaml"))]))
        raise ConfigError(f"{name_or_path}: no such scenario; there are: {known}")
    try:
        return Scenario.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(explain(error, str(path), Scenario)) from error


def cases_of(scenario: Scenario, overrides: Sequence[str] = (), *, with_optional: bool = False) -> list[Case]:
    """The variants to measure, the base first.

    Args:
        scenario: the scenario.
        overrides: `key=value` for all variants, after their own.
        with_optional: take the optional ones too.

    Raises:
        ConfigError: a key of a variant's configuration is wrong; the message names variant and key.
    """
    chosen = [variant for variant in scenario.variants if with_optional or not variant.optional]
    return [_resolve(scenario, variant, overrides) for variant in chosen]


def _resolve(scenario: Scenario, variant: Variant, overrides: Sequence[str]) -> Case:
    values = {"log": deepcopy(scenario.log), **deepcopy(scenario.config)}
    for override in (*variant.overrides, *overrides):
        apply_override(values, override)
    where = f"variant {variant.name!r}"
    try:
        log = LogConfig.model_validate(values.pop("log"))
    except ValidationError as error:
        raise ConfigError(explain(error, f"{where}, `log`", LogConfig)) from error
    stage = variant.stage or scenario.stage
    config = parse_config(_filled(values, log, stage), where)
    measure = variant.measure or scenario.measure
    against = variant.against or scenario.variants[0].name
    before = tuple(variant.before)
    return Case(variant.name, measure, stage, log, config, before, against, variant.ranks, variant.jobs)


def _filled(values: dict[str, Any], log: LogConfig, stage: Stage) -> dict[str, Any]:
    """A whole run configuration: features of the log, and a stage that does not end or change its rates."""
    data = {"train": [_UNUSED], "valid": [_UNUSED], "prepared_dir": _UNUSED}
    budget = {"epochs": 1_000_000, "warmup": 0.0, "patience": None}
    stages = values.get("stages", {})
    return {
        **values,
        "name": "benchmark",
        "run_dir": _UNUSED,
        "data": {**values.get("data", {}), **data},
        "features": log.features(),
        "stages": {**stages, stage: {**stages.get(stage, {}), **budget}},
    }
