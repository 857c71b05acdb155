"""What an earlier attempt left in a stage's directory, and whether a configuration may go on with it."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.loading import load_config, save_config
from hetegen_rec.config.run import RunConfig, Stage
from hetegen_rec.evaluation.results import remove_evaluation
from hetegen_rec.files import write_whole
from hetegen_rec.training.state import StageState

_CONFIG = "config.yaml"
_DONE = "done.json"
_JOB = "job.json"
_FIXED = (
    "seed",
    "features",
    "model",
    "data.shuffle",
    "data.shuffle_rows",
    "train.batch_size",
    "train.table_optimizer",
)
"""What a stage cannot change on its way: model, optimizer state or reader would not fit any more."""
_TUNED = ("train.precision",)
"""What it can, with the stage's own section, if that is wanted."""
_BUDGET = ("epochs", "patience")
"""Keys of that section that may change freely: they say how long to train."""


def begin_attempt(config: RunConfig, stage: Stage, job_id: str) -> None:
    """Writes down what the stage is trained with from now on, and by which job."""
    directory = config.stage_dir(stage)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _DONE).unlink(missing_ok=True)
    remove_evaluation(directory)
    save_config(config, directory / _CONFIG)
    write_whole(directory / _JOB, json.dumps({"job_id": job_id}))


def is_of_job(config: RunConfig, stage: Stage, job_id: str) -> bool:
    """Whether the attempt at hand was begun by a job, whose ranks were started again since."""
    path = config.stage_dir(stage) / _JOB
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["job_id"] == job_id


def end_attempt(config: RunConfig, stage: Stage, state: StageState) -> None:
    """Notes that the stage is finished."""
    done = {
        "steps": state.step,
        "seconds": round(state.seconds, 1),
        "skipped_steps": state.skipped_steps,
        "skipped_rows": state.skipped_rows,
    }
    write_whole(config.stage_dir(stage) / _DONE, json.dumps(done))


def read_done(config: RunConfig, stage: Stage) -> dict[str, Any]:
    """What `end_attempt` noted of a finished stage: steps, seconds, and what was skipped."""
    done: dict[str, Any] = json.loads((config.stage_dir(stage) / _DONE).read_text(encoding="utf-8"))
    return done


def clear_attempt(config: RunConfig, stage: Stage, clear_checkpoints: Callable[[], None]) -> None:
    """Removes what earlier attempts left of a stage.

    Wherever it is cut off, no checkpoint is left without its configuration, and no finished stage without a
    checkpoint.

    Args:
        config: the run.
        stage: which one.
        clear_checkpoints: removes the stage's checkpoints, which may lie elsewhere.
    """
    directory = config.stage_dir(stage)
    (directory / _DONE).unlink(missing_ok=True)
    clear_checkpoints()
    if directory.exists():
        shutil.rmtree(directory)


def knows_configuration(config: RunConfig, stage: Stage) -> bool:
    """Whether the stage's directory says what an earlier attempt was trained with."""
    return (config.stage_dir(stage) / _CONFIG).exists()


def earlier_checkpoints_dir(config: RunConfig, stage: Stage) -> str | None:
    """Where an earlier attempt kept its checkpoints, if this configuration names another place."""
    earlier = _earlier_config(config.stage_dir(stage))
    if earlier is None:
        return None
    # The run directory is the one at hand, under whatever name the earlier attempt knew it.
    place = config.model_copy(update={"checkpoints": earlier.checkpoints}).checkpoints_dir(stage)
    return None if place == config.checkpoints_dir(stage) else place


def is_finished(config: RunConfig, stage: Stage) -> bool:
    """Whether the stage was finished, under whatever budget."""
    return (config.stage_dir(stage) / _DONE).exists()


def is_done(config: RunConfig, stage: Stage) -> bool:
    """Whether the stage was finished under this configuration and budget."""
    earlier = _earlier_config(config.stage_dir(stage))
    if earlier is None or not is_finished(config, stage):
        return False
    budgets = [
        (one.train.max_steps, *(getattr(one.stage(stage), k) for k in _BUDGET)) for one in (earlier, config)
    ]
    return budgets[0] == budgets[1] and not _changes(earlier, config, stage)


def check_attempt(config: RunConfig, stage: Stage, *, accept_changes: bool = False) -> None:
    """Refuses to go on with what another configuration has begun.

    Args:
        config: the run.
        stage: which one.
        accept_changes: whether settings may differ that say how to train, such as learning rates.

    Raises:
        ConfigError: naming what has changed, and what to do.
    """
    directory = config.stage_dir(stage)
    earlier = _earlier_config(directory)
    if earlier is not None:
        check_changes(earlier, config, stage, str(directory), accept_changes=accept_changes)


def check_changes(
    earlier: RunConfig, config: RunConfig, stage: Stage, where: str, *, accept_changes: bool
) -> None:
    """Refuses to go on with what was trained with an earlier configuration, as `check_attempt` does.

    Args:
        earlier: what it was trained with.
        config: the run.
        stage: which one.
        where: its directory or URL, for the message.
        accept_changes: whether settings may differ that say how to train, such as learning rates.

    Raises:
        ConfigError: naming what has changed, and what to do.
    """
    changes = _changes(earlier, config, stage)
    fixed = [key for key in changes if _is_below(key, _FIXED)]
    if not changes or (accept_changes and not fixed):
        return
    named = fixed if accept_changes else list(changes)
    shown = "; ".join(changes[key] for key in named[:4])
    more = f"; and {len(named) - 4} more" if len(named) > 4 else ""
    way_on = "" if fixed else "go on with the new values by --accept-changes, "
    raise ConfigError(
        f"{where} holds a stage trained with another configuration: {shown}{more}. Restore that, {way_on}"
        "set another `run_dir`, or replace the earlier stage with --fresh"
    )


def _earlier_config(directory: Path) -> RunConfig | None:
    path = directory / _CONFIG
    if not path.exists():
        return None
    try:
        return load_config(path)
    except ConfigError as error:
        raise ConfigError(
            f"{path}: an earlier attempt, whose configuration this version cannot read ({error}); set "
            "another `run_dir`, or replace it with --fresh"
        ) from error


def _changes(earlier: RunConfig, now: RunConfig, stage: Stage) -> dict[str, str]:
    """What has changed of that which decides about the weights, by dotted key, in words."""
    before, after = _flat(earlier.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    own = f"stages.{stage}"
    free = {f"{own}.{key}" for key in _BUDGET}
    return {
        key: f"`{key}` was {before.get(key)}, is {after.get(key)}"
        for key in sorted({*before, *after} - free)
        if before.get(key) != after.get(key) and _is_below(key, (*_FIXED, *_TUNED, own))
    }


def _is_below(key: str, prefixes: Iterable[str]) -> bool:
    return any(f"{key}.".startswith(f"{prefix}.") for prefix in prefixes)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries, and lists of named ones such as the fields of a schema, by dotted key."""
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        values = {value.get("name", index): value for index, value in enumerate(values)}
    if not isinstance(values, dict) or not values:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
