"""Whether a killed training resumed and ended as if nothing had happened."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from benchmarks.chaos.records import Attempt, Completed, TrainedRows
from hetegen_rec.evaluation.results import read_evaluation
from hetegen_rec.training.checkpoint import (
    CheckpointInfo,
    best_step,
    complete_steps,
    read_info,
    step_name,
)
from hetegen_rec.training.checkpoint_store import Store

_SHOWN = 3  # of the differences in tensors, or in rows


@dataclass(frozen=True)
class Outcome:
    """What a training ended with."""

    tensors: dict[str, Tensor]
    """All of the newest checkpoint, by path: weights and optimizer state."""
    values: dict[str, Any]
    """Everything else that has to be the same in every run, by path."""
    num_rows: int
    """Rows of the training split."""
    epochs: int
    """Epochs trained."""
    steps: int
    """Steps trained."""


def read_outcome(stage_dir: Path) -> Outcome:
    """Reads what a finished stage left in its directory.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    store = Store(str(stage_dir / "checkpoints"))
    newest = max(complete_steps(store), default=0)
    info = read_info(store.path(step_name(newest)))
    state, evaluation = info.metadata["state"], read_evaluation(stage_dir)
    values = {
        "state": {key: value for key, value in state.items() if key != "seconds"},
        "validation": info.metadata["metrics"],
        "best checkpoint": best_step(store),
        "evaluation": evaluation and evaluation["splits"],
    }
    return Outcome(
        tensors=_read_tensors(info),
        values=dict(_leaves(values)),
        num_rows=info.metadata["rows"]["train"]["num_rows"],
        epochs=state["cursor"]["epoch"] + 1,
        steps=newest,
    )


def _read_tensors(info: CheckpointInfo) -> dict[str, Tensor]:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "state.pt"
        dcp_to_torch_save(info.location, path)
        return dict(_leaves(torch.load(path, weights_only=True)))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested dictionaries hold, by path."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def tensor_problems(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What differs by a single bit; NaN equals a NaN of the same bits, and 0.0 is not -0.0."""
    differing = [
        f"{name} {problem}"
        for name in sorted({*expected, *found})
        if (problem := _difference(expected.get(name), found.get(name)))
    ]
    return _shortened(differing, "tensors")


def _difference(expected: Tensor | None, found: Tensor | None) -> str | None:
    if expected is None or found is None:
        return "is missing" if found is None else "is new"
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        return f"is {found.dtype} {list(found.shape)}, not {expected.dtype} {list(expected.shape)}"
    differs = (_bytes(expected) != _bytes(found)).any(dim=1)
    return f"differs in {int(differs.sum()):,} of {differs.numel():,} elements" if differs.any() else None


def _bytes(tensor: Tensor) -> Tensor:
    """[elements, bytes of one]"""
    return tensor.contiguous().view(-1, 1).view(torch.uint8)


def value_problems(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What is not equal."""
    names = sorted({*expected, *found})
    differing = [name for name in names if expected.get(name) != found.get(name)]
    return _shortened(
        [f"{name} is {found.get(name)}, not {expected.get(name)}" for name in differing], "values"
    )


def effective_steps(attempts: Sequence[Attempt]) -> dict[int, dict[int, TrainedRows]]:
    """The steps that went into the final weights: an attempt takes back what lies behind its start."""
    steps: dict[int, dict[int, TrainedRows]] = {}
    for attempt in attempts:
        steps = {step: rows for step, rows in steps.items() if step <= attempt.start} | attempt.steps
    return steps


def row_problems(steps: Mapping[int, Mapping[int, TrainedRows]], ranks: int, outcome: Outcome) -> list[str]:
    """What keeps these steps from being every training row exactly once per epoch."""
    problems = [
        f"step {step} is known of ranks {sorted(steps.get(step, {}))} only"
        for step in range(1, outcome.steps + 1)
        if len(steps.get(step, {})) != ranks
    ]
    problems += [f"step {step} is one too many" for step in sorted(steps) if step > outcome.steps]
    trained: dict[int, Counter[int]] = {epoch: Counter() for epoch in range(outcome.epochs)}
    for by_rank in steps.values():
        for one in by_rank.values():
            trained.setdefault(one.epoch, Counter()).update(one.rows)
    for epoch, times in trained.items():
        wanted = outcome.num_rows if epoch < outcome.epochs else 0
        problems += [f"epoch {epoch}: row {row} never" for row in range(wanted) if row not in times]
        problems += [
            f"epoch {epoch}: row {row} {count} times"
            for row, count in times.items()
            if count > (0 <= row < wanted)
        ]
    return _shortened(problems, "problems with rows")


def resume_problems(attempts: Sequence[Attempt], completed: Sequence[Completed]) -> list[str]:
    """Attempts that trained again what a complete checkpoint had held before them."""
    problems = []
    for attempt in attempts:
        newest = max((one.step for one in completed if one.attempt < attempt.id), default=0)
        if attempt.start < newest:
            problems.append(
                f"went on from step {attempt.start}, though step {newest} was a complete checkpoint"
            )
    return problems


def _shortened(problems: list[str], what: str) -> list[str]:
    more = len(problems) - _SHOWN
    return problems if more <= 0 else [*problems[:_SHOWN], f"{more} more {what}"]
