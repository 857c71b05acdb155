"""What a run directory tells about its stages, read leniently: a report shows whatever is there."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hetegen_rec.evaluation.counts import FloatArray
from hetegen_rec.evaluation.results import STAGES, FieldReconstruction, StageEvaluation, read_evaluation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Series:
    """Values over the course of training."""

    x: FloatArray
    y: FloatArray

    def __bool__(self) -> bool:
        return len(self.x) > 0

    @property
    def last(self) -> float:
        """The final value."""
        return float(self.y[-1])

    def thinned(self, max_points: int = 200) -> "Series":
        """Means of neighbouring points, at most that many."""
        if len(self.x) <= max_points:
            return self
        parts = [np.array_split(values, max_points) for values in (self.x, self.y)]
        x, y = (np.array([part.mean() for part in split]) for split in parts)
        return Series(x, y)


@dataclass(frozen=True)
class StageRecord:
    """Log, evaluation and configuration of one stage."""

    name: str
    train: list[dict[str, Any]] = field(default_factory=list)
    """Lines of log.jsonl about training steps, in order of step."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Lines of log.jsonl about evaluations during training."""
    evaluation: StageEvaluation | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def field_names(self) -> list[str]:
        """Fields that the generative objective balanced, hardest at the end first."""
        final: dict[str, float] = {}
        for event in self.train:
            for name, values in (event.get("fields") or {}).items():
                if values.get("difficulty") is not None:
                    final[name] = values["difficulty"]
        return sorted(final, key=lambda name: -final[name])

    def field_series(self, name: str, measure: str) -> Series:
        """What log.jsonl has of a field over steps, such as its `loss`, `difficulty` or `weight`."""
        return self._series(self.train, "step", ("fields", name, measure))

    @cached_property
    def mean_gradient_shares(self) -> dict[str, float]:
        """The share of each field in the norms of gradients, mean over training; of probed stages only."""
        series = {name: self.field_series(name, "gradient_share") for name in self.field_names}
        return {name: float(one.y.mean()) for name, one in series.items() if one}

    def term_series(self, term: str) -> Series:
        """One term of the training loss over epochs."""
        return self._series(self.train, "epoch", ("terms", term))

    def evaluation_series(self, metric: str) -> Series:
        """A metric of the evaluations on valid during training over epochs."""
        return self._series(self.evaluations, "epoch", (metric,))

    @staticmethod
    def _series(events: Sequence[dict[str, Any]], x: str, path: tuple[str, ...]) -> Series:
        points = [(event.get(x), _dig(event, path)) for event in events]
        kept = [(a, b) for a, b in points if a is not None and b is not None and np.isfinite(b)]
        columns = np.array(kept, dtype=np.float64).reshape(-1, 2)
        return Series(columns[:, 0], columns[:, 1])

    def result(self, split: str) -> dict[str, Any] | None:
        """The final evaluation on one split."""
        return None if self.evaluation is None else self.evaluation["splits"].get(split)

    @property
    def reconstruction(self) -> dict[str, dict[str, FieldReconstruction]]:
        """How well held-out rows were reconstructed, by split and field; empty if that was not measured."""
        return {} if self.evaluation is None else self.evaluation.get("reconstruction", {})

    @property
    def samples_per_second(self) -> float | None:
        """Median throughput over the log."""
        rates = [event["samples_per_second"] for event in self.train if event.get("samples_per_second")]
        return float(np.median(rates)) if rates else None


@dataclass(frozen=True)
class RunRecord:
    """The stages of a run that left a trace, in order."""

    run_dir: Path
    stages: dict[str, StageRecord]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the last stage that stored one."""
        stored = [stage.config for stage in self.stages.values() if stage.config]
        return stored[-1] if stored else {}

    @property
    def name(self) -> str:
        """Name of the run, or of its directory."""
        return str(self.config.get("name") or self.run_dir.resolve().name)

    @property
    def evaluations(self) -> dict[str, StageEvaluation]:
        """Final evaluations by stage."""
        found = {name: stage.evaluation for name, stage in self.stages.items()}
        return {name: evaluation for name, evaluation in found.items() if evaluation is not None}


def read_run(run_dir: str | Path) -> RunRecord:
    """Reads every stage under a run directory.

    Raises:
        EvaluationError: an evaluation.json is damaged.
    """
    root = Path(run_dir)
    records = [_read_stage(root / stage) for stage in STAGES if (root / stage).is_dir()]
    kept = {one.name: one for one in records if one.train or one.evaluations or one.evaluation}
    return RunRecord(root, kept)


def _read_stage(directory: Path) -> StageRecord:
    events = _read_log(directory / "log.jsonl")
    config_path = directory / "config.yaml"
    config = yaml.safe_load(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
    return StageRecord(
        directory.name,
        [event for event in events if event.get("event") == "train"],
        [event for event in events if event.get("event") == "evaluation"],
        read_evaluation(directory),
        config if isinstance(config, dict) else {},
    )


def _read_log(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    events = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            events.append(json.loads(line))
        except ValueError:
            # The last line of a run that was killed may be cut off.
            logger.warning("%s: line %d is not JSON; left out of the report", path, number)
    return sorted((e for e in events if isinstance(e, dict)), key=lambda event: event.get("step", 0))


def _dig(event: dict[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = event
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
