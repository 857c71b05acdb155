"""Training over time-ordered periods: which models are trained, on what, and from which other.

Every model is an ordinary run of one stage in a directory of its own, under `RUN_DIR/incremental/`:

    settings.json                what the sequence was begun with
    periods/                     the log, cut (`data.periods`)
    first/                       the first model, from nothing, with which all ways begin
    finetune/period-NN/          a model whose newest rows are of that period
    retrain/period-NN/
    fesail/period-NN/            with replay/ beside the stage: the replayed rows, and how stale ids are
    incremental.json, incremental.html      results

The model of period t is trained on what is new since the model of t - 1, validated on the newest share of t,
and tested on t + 1.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.incremental import IncrementalStage, Way
from hetegen_rec.config.loading import parse_config
from hetegen_rec.config.run import RunConfig
from hetegen_rec.data.manifest import read_manifest
from hetegen_rec.data.periods import Periods, cut_periods, row_groups_in
from hetegen_rec.data.replay import Replay, ReplayWriter, read_replay
from hetegen_rec.data.staleness import Staleness
from hetegen_rec.distributed.runtime import Runtime
from hetegen_rec.evaluation.incremental import SequenceResults, UpdateResult
from hetegen_rec.evaluation.results import read_evaluation
from hetegen_rec.files import write_whole
from hetegen_rec.training.attempts import read_done
from hetegen_rec.training.progress import RowsProgress
from hetegen_rec.training.stages import fetch_data

logger = logging.getLogger(__name__)

_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Update:
    """One model of the sequence."""

    way: Way | None
    """None for the first model."""
    period: int
    """Number of its newest period."""
    config: RunConfig
    """The run that trains, validates and tests it."""
    replay: Replay | None = None


def sequence_dir(config: RunConfig) -> Path:
    """Where a run's models over periods lie."""
    return Path(config.run_dir) / "incremental"


class ModelSequence:
    """The models of a run, period after period, and their results as they come."""

    def __init__(self, config: RunConfig, runtime: Runtime, periods: Periods) -> None:
        """Begins with the first model, whatever of the sequence is done already.

        Args:
            config: the run.
            runtime: this process's view of the job.
            periods: the log, cut.
        """
        self.stage: IncrementalStage = config.incremental.stage
        self.results = SequenceResults(
            config.name,
            self.stage,
            config.seed,
            config.incremental.ways,
            [asdict(period) for period in periods.periods],
        )
        self._config, self._runtime, self._periods = config, runtime, periods
        self._first_period = config.incremental.first_periods

    def updates(self) -> Iterator[Update]:
        """The models in the order of training. A collective at every step.

        One is to be trained and evaluated before the next is asked for.
        """
        yield self._first()
        for period in range(self._first_period + 1, self._periods.last):
            for way in self._config.incremental.ways:
                yield self._after(way, period)

    def record(self, update: Update) -> None:
        """Takes in what a trained and evaluated model scored, and writes all results; for rank 0."""
        directory = update.config.stage_dir(self.stage)
        evaluation = read_evaluation(directory)
        if evaluation is None:
            raise RuntimeError(f"{directory} was not evaluated")
        self.results.updates.append(
            UpdateResult.of(
                update.way,
                update.period,
                read_manifest(update.config.data.prepared_dir).num_rows["train"],
                read_done(update.config, self.stage),
                evaluation["splits"]["test"],
                asdict(update.replay.summary) if update.replay else None,
            )
        )
        self.results.write(sequence_dir(self._config))

    def _first(self) -> Update:
        period = self._first_period
        return Update(None, period, self._run(None, period, self._periods.files_up_to(period)))

    def _after(self, way: Way, period: int) -> Update:
        if way == "retrain":
            return Update(way, period, self._run(way, period, self._periods.files_up_to(period)))
        new: dict[str, Any] = {
            "start_from": self._checkpoint(way, period - 1),
            "epochs": self._config.incremental.epochs,
        }
        replay = self._replay(period) if way == "fesail" else None
        files = self._periods.new_files(period)
        if replay is not None:
            files = [*replay.files, *files]
            new["stale_ids"] = self._held(replay)
        older = self._prepared_dir(way, period - 1)
        return Update(way, period, self._run(way, period, files, keep_ids_of=older, **new), replay)

    def _held(self, replay: Replay) -> dict[str, Any] | None:
        strength = self._config.incremental.regularisation
        return {"directory": str(replay.staleness_dir), "regularisation": strength} if strength else None

    def _replay(self, period: int) -> Replay:
        """The rows to replay, and how stale ids are, in a period of `fesail`. A collective."""
        directory = self._directory("fesail", period) / "replay"
        found = self._runtime.broadcast(read_replay(directory))
        if found is not None:
            return found
        config = self._config
        with RowsProgress(enabled=self._runtime.is_main) as progress:
            writer = ReplayWriter(
                config.features,
                self._prepared_dir("fesail", period - 1),
                config.data.rows_per_group,
                self._runtime,
                progress,
                skip_bad=config.data.on_bad_shard == "skip",
            )
            staleness = self._age(writer, self._staleness_before(writer, period), period)
            candidates = row_groups_in(self._trained_on(period - 1), self._runtime)
            replay = writer.write(directory, staleness, candidates, config.incremental)
        summary = replay.summary
        logger.info(
            "period %d: %d rows replayed, of %d candidates, with %d of the %d ids that it lacks",
            period,
            summary.rows,
            summary.candidates,
            summary.covered_ids,
            summary.stale_ids,
        )
        return replay

    def _staleness_before(self, writer: ReplayWriter, period: int) -> Staleness:
        """How stale ids were in the period before; over the first periods it is counted from their rows."""
        if period - 1 > self._first_period:
            return Staleness.load(self._directory("fesail", period - 1) / "replay" / "staleness")
        staleness = Staleness({})
        for earlier in range(1, period):
            staleness = self._age(writer, staleness, earlier)
        return staleness

    def _age(self, writer: ReplayWriter, staleness: Staleness, period: int) -> Staleness:
        return writer.age(staleness, row_groups_in(self._periods.new_files(period), self._runtime))

    def _trained_on(self, period: int) -> list[str]:
        """What the model of `fesail` was trained on in a period."""
        if period == self._first_period:
            return self._periods.files_up_to(period)
        return [*self._replay(period).files, *self._periods.new_files(period)]

    def _directory(self, way: Way | None, period: int) -> Path:
        """Of a way's model of a period; all ways share the first."""
        directory = sequence_dir(self._config)
        if way is None or period == self._first_period:
            return directory / "first"
        return directory / way / f"period-{period:02d}"

    def _prepared_dir(self, way: Way | None, period: int) -> str:
        return str(self._directory(way, period) / "prepared")

    def _checkpoint(self, way: Way, period: int) -> str:
        """The checkpoint by which a model was evaluated, as rank 0 finds it. A collective."""
        evaluation = read_evaluation(self._directory(way, period) / self.stage)
        found: str | None = self._runtime.broadcast(evaluation["checkpoint"] if evaluation else None)
        if found is None:
            raise RuntimeError(f"the model of {way} of period {period} was not evaluated")
        return found

    def _run(
        self, way: Way | None, period: int, train: Sequence[str], keep_ids_of: str | None = None, **stage: Any
    ) -> RunConfig:
        """The run of one model: that of the sequence on other data, with some keys of its stage changed."""
        values = self._config.model_dump(exclude={"incremental"})
        directory = self._directory(way, period)
        values["name"] = f"{self._config.name} {way or 'first'} {period}"
        values["run_dir"] = str(directory)
        values["data"] |= {
            "source": None,
            "raw_dir": None,
            "train": tuple(train),
            "valid": tuple(self._periods.files(period, "late")),
            "test": tuple(self._periods.files(period + 1)),
            "prepared_dir": self._prepared_dir(way, period),
            "keep_ids_of": keep_ids_of,
        }
        values["stages"][self.stage] |= stage
        if (place := self._config.checkpoints.directory) is not None:
            inside = directory.relative_to(self._config.run_dir).as_posix()
            values["checkpoints"]["directory"] = f"{place.rstrip('/')}/{inside}"
        return parse_config(values, values["name"])


def open_sequence(config: RunConfig, runtime: Runtime, *, fresh: bool = False) -> ModelSequence:
    """Cuts the log of a run into periods, unless that is done, and begins or goes on. A collective.

    Args:
        config: the run.
        runtime: this process's view of the job.
        fresh: replace what earlier attempts left. Ranks that the launcher started again go on all the same.

    Raises:
        ConfigError: the run cannot be trained over periods, or was begun with other settings.
        DataError: its data cannot be cut.
    """
    directory = sequence_dir(config)
    with runtime.together(f"opening {directory}"):
        _refuse_unfit(config)
        if runtime.is_main:
            if fresh and not _is_of_job(directory, runtime):
                shutil.rmtree(directory, ignore_errors=True)
            _check_settings(directory, config)
    fetch_data(config, runtime)
    with RowsProgress(enabled=runtime.is_main) as progress:
        periods = cut_periods(config, directory / "periods", runtime, progress)
    with runtime.together(f"writing {directory / _SETTINGS}"):
        if runtime.is_main:
            content = {"job_id": runtime.job_id, "settings": _settings(config)}
            write_whole(directory / _SETTINGS, json.dumps(content, indent=1))
    return ModelSequence(config, runtime, periods)


def _refuse_unfit(config: RunConfig) -> None:
    stage = config.incremental.stage
    own = config.stage(stage)
    for key, value in (
        ("data.keep_ids_of", config.data.keep_ids_of),
        (f"stages.{stage}.start_from", own.start_from),
        (f"stages.{stage}.stale_ids", own.stale_ids),
    ):
        if value is not None:
            raise ConfigError(
                f"`{key}` says from what to go on, but over periods the first model starts from nothing and "
                "the others from that before; remove it"
            )


def _is_of_job(directory: Path, runtime: Runtime) -> bool:
    """Whether this job began what is there, and its ranks were started again since."""
    path = directory / _SETTINGS
    if runtime.restart_count:
        return True
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["job_id"] == runtime.job_id


def _settings(config: RunConfig) -> dict[str, Any]:
    """What a sequence cannot change on its way, by dotted key; the rest each model's stage checks."""
    stage = config.incremental.stage
    sections = {
        "incremental": config.incremental.model_dump(mode="json", exclude={"ways"}),
        f"stages.{stage}": config.stage(stage).model_dump(mode="json"),
    }
    settings = {f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()}
    return settings | {"train.max_steps": config.train.max_steps}


def _check_settings(directory: Path, config: RunConfig) -> None:
    path = directory / _SETTINGS
    if not path.exists():
        return
    before, now = json.loads(path.read_text(encoding="utf-8"))["settings"], _settings(config)
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if changed:
        told = "; ".join(f"`{key}` was {before.get(key)}, is {now.get(key)}" for key in changed[:4])
        raise ConfigError(
            f"{directory} was begun with other settings: {told}. Restore them, set another `run_dir`, or "
            "replace it with --fresh"
        )
