"""evaluation.json of a stage, and what several stages of a run say beside each other."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from typing_extensions import NotRequired, TypedDict

from hetegen_rec.config.run import Stage
from hetegen_rec.evaluation.errors import EvaluationError
from hetegen_rec.evaluation.metrics import auc, relative_improvement
from hetegen_rec.evaluation.significance import Interval, auc_difference_interval, read_predictions
from hetegen_rec.files import write_whole

logger = logging.getLogger(__name__)

FILE_NAME = "evaluation.json"
STAGES: tuple[Stage, ...] = get_args(Stage)
BASE_STAGE: Stage = "scratch"
STAGE_TITLES: dict[str, str] = {
    "pretrain": "Pre-trained",
    "finetune": "Fine-tuned",
    "joint": "Joint",
    "scratch": "From scratch",
}


_ROUNDING = 1e-6
"""Of an AUC, by probabilities that are stored as float32."""

LevelReconstruction = TypedDict(
    "LevelReconstruction", {"from": float, "to": float, "targets": int, "cross_entropy": float | None}
)
"""Targets of rows in a range of the noise level t, and their mean cross-entropy in nats."""


class FieldReconstruction(TypedDict):
    """How well the noised cells of one field were predicted; None where nothing was."""

    targets: int
    among: str | None
    """What the true value competes with: the `vocabulary`, in-batch `candidates`, or nothing (None)."""
    cross_entropy: float | None
    """Nats."""
    chance: float | None
    """Cross-entropy of a uniform guess."""
    baseline: float | None
    """Cross-entropy of a guess by the field's frequencies: its entropy, or for candidates `chance`."""
    relative: float | None
    """r, the cross-entropy relative to chance."""
    top_1: float | None
    """Share of the targets whose true value comes first; ties count against it."""
    top_10: float | None
    levels: list[LevelReconstruction]


class StageEvaluation(TypedDict):
    """Content of evaluation.json."""

    run: str
    stage: str
    checkpoint: str
    step: int
    asked_for: NotRequired[dict[str, Any]]
    """The `--checkpoint`, or None for the best one, and the configuration's sections `inference` and
    `evaluation`."""
    splits: dict[str, dict[str, Any]]
    """Results of `gather.evaluate_predictions` by split; none at the end of pre-training."""
    reconstruction: NotRequired[dict[str, dict[str, FieldReconstruction]]]
    """Of generative stages: results by split and field."""


def write_evaluation(stage_dir: Path, evaluation: StageEvaluation) -> Path:
    """Writes evaluation.json in one piece: a reader sees the old file or the new one."""
    path = stage_dir / FILE_NAME
    stage_dir.mkdir(parents=True, exist_ok=True)
    # NaN is not JSON, and no metric may be one.
    write_whole(path, json.dumps(evaluation, indent=2, allow_nan=False) + "\n")
    return path


def remove_evaluation(stage_dir: Path) -> None:
    """Removes evaluation.json, if it is there: training makes it outdated."""
    (stage_dir / FILE_NAME).unlink(missing_ok=True)


def read_evaluation(stage_dir: Path) -> StageEvaluation | None:
    """Reads evaluation.json; None if the stage was not evaluated.

    Raises:
        EvaluationError: the file is not what `write_evaluation` writes.
    """
    path = stage_dir / FILE_NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}; evaluate the stage again") from error
    missing = [key for key in sorted(StageEvaluation.__required_keys__) if key not in content]
    if missing:
        raise EvaluationError(f"{path}: lacks {', '.join(missing)}; evaluate the stage again")
    evaluation: StageEvaluation = content
    return evaluation


def read_evaluations(run_dir: Path) -> dict[str, StageEvaluation]:
    """The evaluations of a run's stages, in order of stage."""
    found = {stage: read_evaluation(run_dir / stage) for stage in STAGES}
    return {stage: evaluation for stage, evaluation in found.items() if evaluation is not None}


def headline_split(evaluations: Mapping[str, StageEvaluation]) -> str:
    """The split that results are about: `test` if any stage was evaluated on it, else `valid`."""
    return "test" if any("test" in one["splits"] for one in evaluations.values()) else "valid"


def strategy_note(result: Mapping[str, Any]) -> str:
    """Strategy and cost of a split's scores, to stand behind the stage's name; nothing for plain scoring."""
    account = result.get("inference", {})
    if account.get("strategy", "plain") == "plain":
        return ""
    return f" ({account['strategy']}, {account['passes_per_row']:.2f} passes)"


@dataclass(frozen=True)
class Comparison:
    """One stage against the same network trained from scratch."""

    stage: str
    split: str
    auc_difference: float
    relative_improvement: float | None
    interval: Interval | None
    """Of the AUC difference; None unless both stages left the predictions that were evaluated, of the same
    rows."""
    note: str = ""
    """Strategy and cost of the stage's scores, as `strategy_note` has them."""
    base_note: str = ""
    """Those of from-scratch."""


def compare_with_scratch(
    run_dir: Path, evaluations: Mapping[str, StageEvaluation], split: str
) -> dict[str, Comparison]:
    """Compares every other click stage with from-scratch; empty if one side is missing."""
    base = _auc(evaluations, BASE_STAGE, split)
    comparisons = {}
    for stage in ("finetune", "joint"):
        value = _auc(evaluations, stage, split)
        if value is None or base is None:
            continue
        comparisons[stage] = Comparison(
            stage,
            split,
            value - base,
            relative_improvement(value, base),
            _interval(run_dir, split, {stage: value, BASE_STAGE: base}),
            note=strategy_note(evaluations[stage]["splits"][split]),
            base_note=strategy_note(evaluations[BASE_STAGE]["splits"][split]),
        )
    return comparisons


def _auc(evaluations: Mapping[str, StageEvaluation], stage: str, split: str) -> float | None:
    if stage not in evaluations:
        return None
    value: float | None = evaluations[stage]["splits"].get(split, {}).get("auc")
    return value


def _interval(run_dir: Path, split: str, aucs: Mapping[str, float]) -> Interval | None:
    """The interval of the difference of two stages, given with their evaluated AUCs, the base last."""
    tables = []
    for stage, value in aucs.items():
        directory = run_dir / stage / "predictions" / split
        found = read_predictions(directory)
        if found is None:
            return None
        if abs((auc(found.probabilities, found.labels) or 0.0) - value) > _ROUNDING:
            logger.warning(
                "%s: other predictions than those that were evaluated, as `predict` leaves them of another "
                "checkpoint or strategy; no confidence interval. Evaluate %s again",
                directory,
                stage,
            )
            return None
        tables.append(found)
    ours, theirs = tables
    try:
        return auc_difference_interval(ours, theirs)
    except EvaluationError as error:
        logger.warning("no confidence interval for %s on %s: %s", next(iter(aucs)), split, error)
        return None
