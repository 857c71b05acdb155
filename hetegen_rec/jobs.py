"""The verbs of the project: what `hetegen VERB` and the scripts under launch/ do."""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from hetegen_rec import terminal
from hetegen_rec.config.data import Split
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.run import CLICK_STAGES, RunConfig, Stage
from hetegen_rec.data.prepare import encode_files
from hetegen_rec.data.reader import Reader
from hetegen_rec.distributed.runtime import DistributedError, Runtime
from hetegen_rec.evaluation.capacity import capacity_tables
from hetegen_rec.evaluation.capacity_page import write_capacity
from hetegen_rec.evaluation.incremental import results_table as incremental_table
from hetegen_rec.evaluation.incremental import write_page
from hetegen_rec.evaluation.rehearsal import rehearsal_tables, write_rehearsal
from hetegen_rec.evaluation.report import write_report
from hetegen_rec.evaluation.tables import results_tables
from hetegen_rec.export.delta import write_delta
from hetegen_rec.export.summary import artifact_table, delta_table
from hetegen_rec.export.triton import add_to_repository
from hetegen_rec.locks import directory_lock
from hetegen_rec.models.embedding import table_shapes
from hetegen_rec.scoring.manifest import Artifact, open_artifact
from hetegen_rec.training import stages
from hetegen_rec.training.capacity import plan_capacity
from hetegen_rec.training.incremental import open_sequence, sequence_dir
from hetegen_rec.training.progress import RowsProgress
from hetegen_rec.training.rehearsal import check_rehearsal, rehearse
from hetegen_rec.training.scoring import write_predictions
from hetegen_rec.training.setup import open_encoded, open_split
from hetegen_rec.training.trained import Choice, choose, is_evaluated

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One verb's work: the run, this process's place in it, and what the command line chose."""

    config: RunConfig
    runtime: Runtime
    stage: Stage | None = None
    """The trained stage to evaluate or predict with; default: as of `trained.choose`."""
    checkpoint: str | None = None
    """A checkpoint's directory; default: as of `trained.choose`."""
    split: Split = "test"
    """The split to predict, where `inputs` names no files."""
    inputs: Sequence[str] = ()
    """Raw files to predict instead of a split: paths and globs. They need no label."""
    output: str | None = None
    """Where predictions go; default: beside the stage's checkpoints."""
    fresh: bool = False
    """Train anew and replace what earlier attempts left, instead of going on with it."""
    accept_changes: bool = False
    """Go on with an earlier attempt also where settings differ that say how to train."""
    with_report: bool = True
    """Write the run's report.html after training and evaluation."""
    delta_from: str | None = None
    """The artifact that an export should only tell the changes of."""
    rehearse: int | None = None
    """What to divide the rows of tables by, to try a plan on ranks of this machine; default: do not."""
    triton: str | None = None
    """Model repository of a Triton server that an exported artifact also goes to."""


def plan(job: Job) -> None:
    """Plans a stage for the cluster of `plan`, and says what its steps would need there."""
    if job.runtime.world_size > 1:
        raise ConfigError("`plan` is the work of one process; the ranks to plan for are plan.world")
    if job.rehearse is not None:
        check_rehearsal(job.rehearse)
    planned = plan_capacity(job.config, job.stage or "pretrain")
    directory = Path(job.output) if job.output is not None else Path(job.config.run_dir) / "plan"
    write_capacity(planned.report, directory)
    terminal.results().print(capacity_tables(planned.report))
    terminal.results().print(f"plan: {directory / 'plan.html'}")
    if job.rehearse is not None:
        found = rehearse(job.config, planned, job.rehearse)
        write_rehearsal(found, directory)
        terminal.results().print(rehearsal_tables(found))
        if found.problems:
            raise DistributedError(f"the rehearsal went wrong: {'; '.join(found.problems)}")


def prepare_data(job: Job) -> None:
    """Encodes the raw data, once."""
    stages.prepare_data(job.config, job.runtime)


def train(stage: Stage) -> Callable[[Job], None]:
    """The verb that trains one stage and evaluates what it is for: clicks, reconstruction, or both."""

    def verb(job: Job) -> None:
        if _train(job, stage):
            _show_results(job)

    return verb


def evaluate(job: Job) -> None:
    """Scores the validation and test rows with one stage's best checkpoint; writes and shows it."""
    _choose(job).load().evaluate(job.config.splits())
    _show_results(job)


def predict(job: Job) -> None:
    """Writes row id and click probability of every row of a split, or of raw files."""
    if not job.inputs and job.split not in job.config.splits():
        raise ConfigError(f"data.{job.split} names no files, so there is nothing to predict")
    choice = _choose(job)
    trained = choice.load()
    directory = choice.directory / "predictions" / (job.split if not job.inputs else "input")
    if job.output is not None:
        directory = Path(job.output)
        with job.runtime.together("checking the output"):
            _refuse_filled(directory)
    with _alone(job, directory):
        if job.inputs:
            with _encoded(job, directory) as encoded:
                reader = open_encoded(job.config, encoded, choice.statistics, job.runtime, stage=choice.stage)
                write_predictions(trained.score(reader), directory, job.runtime, labelled=False)
        else:
            write_predictions(trained.score_split(job.split), directory, job.runtime)
    account = trained.account()
    if job.runtime.is_main:
        logger.info("scored by %s", ", ".join(f"{key} {value}" for key, value in account.items()))
        terminal.results().print(f"predictions: {directory}")


def export(job: Job) -> None:
    """Writes an artifact of one stage's best checkpoint, or only what changed since an earlier artifact."""
    if job.runtime.world_size > 1:
        raise ConfigError("`export` is the work of one process; start it without a launcher")
    choice = _choose(job)
    kind = "artifact" if job.delta_from is None else "delta"
    target = Path(job.output) if job.output is not None else choice.directory / kind
    if job.output is not None:
        _refuse_filled(target)
    if job.delta_from is None:
        _export(choice, target)
    else:
        _export_delta(choice, open_artifact(job.delta_from), target)
    terminal.results().print(f"{kind}: {target}")
    if job.triton is not None:
        version = add_to_repository(Path(job.triton), open_artifact(target, verify=False))
        terminal.results().print(f"triton: {version}")


def report(job: Job) -> None:
    """Collects what the run directory holds into report.html."""
    if job.runtime.is_main:
        terminal.results().print(f"report: {write_report(job.config.run_dir).resolve()}")


def demo(job: Job) -> None:
    """Pre-trains, fine-tunes and trains from scratch, skipping what is done; compares and reports."""
    wanted: tuple[Stage, ...] = ("pretrain", "finetune", "scratch")
    if all(_train(job, stage) for stage in wanted):  # each only if the one before was not stopped
        _show_results(job)


def incremental(job: Job) -> None:
    """Trains over the periods of a log in time order, and tests each model on the period after."""
    config, directory = job.config, sequence_dir(job.config)
    with _alone(job, directory):
        sequence = open_sequence(config, job.runtime, fresh=job.fresh)
        for update in sequence.updates():
            if not _train(replace(job, config=update.config), sequence.stage):
                return
            with job.runtime.together("recording a model's results"):
                if job.runtime.is_main:
                    sequence.record(update)
    if job.runtime.is_main:
        terminal.results().print(incremental_table(sequence.results))
        terminal.results().print(f"report: {write_page(sequence.results, directory).resolve()}")


def _train(job: Job, stage: Stage) -> bool:
    """Trains a stage and evaluates it, whatever of it is not done yet; returns whether it is finished."""
    with _alone(job, job.config.stage_dir(stage)):
        finished = stages.run_stage(
            job.config, stage, job.runtime, fresh=job.fresh, accept_changes=job.accept_changes
        )
        if not finished:
            return False
        if not is_evaluated(job.config, stage, job.runtime):
            trained = choose(job.config, job.runtime, stage).load()
            trained.evaluate(job.config.splits() if stage in CLICK_STAGES else ())
        return True


@contextmanager
def _alone(job: Job, directory: Path) -> Iterator[None]:
    """Context in which no other job may write to a directory."""
    with ExitStack() as stack:
        with job.runtime.together(f"taking {directory}"):
            if job.runtime.is_main:
                try:
                    stack.enter_context(directory_lock(directory))
                except OSError as error:
                    run = f"run_dir: {job.config.run_dir}"
                    place = run if job.output is None else f"--output {job.output}"
                    raise ConfigError(
                        f"{place}: cannot be made or written to ({error}); set it to a directory that can"
                    ) from error
        yield


def _show_results(job: Job) -> None:
    if job.runtime.is_main:
        terminal.results().print(results_tables(job.config.run_dir))
        if job.with_report:
            report(job)


def _choose(job: Job) -> Choice:
    """The checkpoint that the command line asks for. A collective."""
    return choose(job.config, job.runtime, job.stage, job.checkpoint)


def _export(choice: Choice, target: Path) -> None:
    config, statistics, runtime = choice.config, choice.statistics, choice.runtime

    def open_rows(split: Split) -> Reader:
        return open_split(config, split, statistics, runtime, stage=choice.stage)

    # Torch's compilers take a second to import, which no other verb should pay.
    from hetegen_rec.export.package import Exporter

    shapes = table_shapes(config.features, statistics, config.model.dim)
    choice.checkpoints.check_tables(
        choice.checkpoint, {shape.name: (shape.num_rows, shape.dim) for shape in shapes}
    )
    exporter = Exporter(config, choice.stage, choice.checkpoint, statistics, runtime, open_rows)
    terminal.results().print(artifact_table(exporter.write(target)))


def _export_delta(choice: Choice, base: Artifact, target: Path) -> None:
    """Exports everything beside the target, past the gate, and keeps what differs."""
    whole = target.with_name(f".{target.name}.whole")
    try:
        _export(choice, whole)
        delta = write_delta(base, open_artifact(whole, verify=False), target)
    finally:
        shutil.rmtree(whole, ignore_errors=True)
    terminal.results().print(delta_table(delta))


def _refuse_filled(directory: Path) -> None:
    """The directory of the caller's choice may hold anything, so nothing there is replaced."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"--output {directory}: exists already; name a new directory, or remove it")


@contextmanager
def _encoded(job: Job, output: Path) -> Iterator[Path]:
    """A directory beside the output that holds the job's input files encoded, while they are scored."""
    directory = output.with_name(f".{output.name}.encoded")
    try:
        with RowsProgress(enabled=job.runtime.is_main) as progress:
            encode_files(job.config, job.inputs, directory, job.runtime, progress)
        yield directory
    finally:
        if job.runtime.is_main:
            shutil.rmtree(directory, ignore_errors=True)
