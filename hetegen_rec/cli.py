"""`hetegen VERB --config FILE key=value ...`: every verb of a run as one command."""

import argparse
import errno
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from hetegen_rec import jobs
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.loading import load_config
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.sources import SourceError
from hetegen_rec.distributed.planning import PlanningError
from hetegen_rec.distributed.runtime import (
    DistributedError,
    LostPeerError,
    PeerFailedError,
    describe_loss,
    is_launched,
    leads_host,
    start_runtime,
)
from hetegen_rec.evaluation.errors import EvaluationError
from hetegen_rec.export.parity import ParityError
from hetegen_rec.jobs import Job
from hetegen_rec.launching.exit_codes import FAILED, LOST_PEER
from hetegen_rec.launching.relaunch import relaunch
from hetegen_rec.locks import LockedError
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.terminal import quiet_libraries, show_log
from hetegen_rec.training.checkpoint import CheckpointError
from hetegen_rec.training.guard import NonFiniteError
from hetegen_rec.verbs import RUN_VERBS, listed

DEFAULT_CONFIG = "configs/movielens_100k.yaml"

_INTERRUPTED = 130
"""Exit code after Ctrl-C, as of shells."""

USER_ERRORS = (
    ArtifactError,
    CheckpointError,
    ConfigError,
    DataError,
    DistributedError,
    EvaluationError,
    LockedError,
    NonFiniteError,
    ParityError,
    PlanningError,
    SourceError,
)
"""Errors whose message is enough for the person who sees it; a traceback would only hide it."""

_STORAGE_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EEXIST,
)
"""What the system says of a place where nothing can be written."""

Verb = Callable[[Job], None]

_WORK: dict[str, Verb] = {
    "plan": jobs.plan,
    "prepare": jobs.prepare_data,
    "pretrain": jobs.train("pretrain"),
    "finetune": jobs.train("finetune"),
    "joint": jobs.train("joint"),
    "scratch": jobs.train("scratch"),
    "incremental": jobs.incremental,
    "evaluate": jobs.evaluate,
    "predict": jobs.predict,
    "export": jobs.export,
    "report": jobs.report,
    "demo": jobs.demo,
}
_OF_ONE_PROCESS = ("plan", "export")
"""Verbs that start no ranks."""

VERBS: dict[str, tuple[Verb, str]] = {name: (_WORK[name], text) for name, text in RUN_VERBS.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command; returns its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    verb = _parse_verb(given[:1])
    parser = _parser_of(verb)
    # Overrides may stand anywhere among the options, and behind a `--`.
    options = parser.parse_intermixed_args([word for word in given[1:] if word != "--"])
    if options.ranks < 1 or options.max_restarts < 0:
        parser.error(
            f"--ranks {options.ranks} --max-restarts {options.max_restarts}: at least 1 rank and 0 restarts"
        )
    if options.ranks > 1 or options.max_restarts > 0:
        if is_launched():
            parser.error(
                "--ranks and --max-restarts start processes themselves; leave them out under torchrun and "
                "torchx, which have options of their own"
            )
        alone = [*given, "--ranks", "1", "--max-restarts", "0"]
        return relaunch("hetegen_rec.cli", options.ranks, alone, options.max_restarts)
    quiet_libraries()
    try:
        return _run(verb, options)
    except KeyboardInterrupt:
        return _INTERRUPTED


def launch(verb: str) -> None:
    """What the scripts under launch/ call; ends the process with the verb's exit code."""
    sys.exit(main([verb, *sys.argv[1:]]))


def _parse_verb(arguments: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(
        prog="hetegen",
        usage="hetegen VERB [options] [key=value ...]",
        description="Trains, evaluates, exports and serves click models.",
        epilog=f"verbs:\n{listed()}\n\n`hetegen VERB --help` lists its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="what to do")
    verb: str = parser.parse_args(arguments).verb
    return verb


def _parser_of(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"hetegen {verb}", description=VERBS[verb][1])
    parser.add_argument("--config", default=DEFAULT_CONFIG, help=f"YAML file (default {DEFAULT_CONFIG})")
    parser.set_defaults(ranks=1, max_restarts=0)
    if verb not in _OF_ONE_PROCESS:
        _add_rank_options(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.max_steps=4")
    parser.set_defaults(stage=None, checkpoint=None, split="test", input=[], output=None)
    parser.set_defaults(fresh=False, accept_changes=False, with_report=True, delta_from=None, triton=None)
    parser.set_defaults(rehearse=None)
    if verb in ("pretrain", "finetune", "joint", "scratch", "demo"):
        _add_training_options(parser)
    if verb == "incremental":
        _add_fresh(parser)
    if verb in ("pretrain", "finetune", "joint", "scratch", "demo", "evaluate"):
        parser.add_argument(
            "--no-report",
            dest="with_report",
            action="store_false",
            help="leave out report.html, whose plots take seconds; `hetegen report` writes it any time",
        )
    if verb in ("evaluate", "predict", "export"):
        _add_model_options(parser)
    if verb == "export":
        parser.add_argument(
            "--output", metavar="DIR", help="new directory of the artifact (default: in the run's)"
        )
        form = parser.add_mutually_exclusive_group()
        form.add_argument(
            "--delta-from",
            metavar="ARTIFACT",
            help="write only what changed since an earlier artifact, for `hetegen apply-delta`",
        )
        form.add_argument(
            "--triton",
            metavar="DIR",
            help="also put the artifact into this model repository of a Triton server, as a new version",
        )
    if verb == "predict":
        _add_row_options(parser)
    if verb == "plan":
        _add_plan_options(parser)
    return parser


def _add_rank_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks", type=int, default=1, help="processes to start on this machine (default: one)"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="how often to start all processes again when one dies; training goes on from its newest "
        "checkpoint (default: never)",
    )


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    earlier = parser.add_mutually_exclusive_group()
    _add_fresh(earlier)
    earlier.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on with an earlier attempt although settings that say how to train differ, such as rates",
    )


def _add_fresh(options: argparse._ActionsContainer) -> None:
    options.add_argument(
        "--fresh",
        action="store_true",
        help="train anew and replace what earlier attempts left, instead of going on with it",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stage",
        choices=["pretrain", "finetune", "joint", "scratch"],
        help="whose model to use (default: the first that is trained, of finetune, joint, scratch)",
    )
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="one of its `step-N` directories, or a URL (default: its best)"
    )


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stage",
        choices=["pretrain", "finetune", "joint", "scratch"],
        help="the stage to plan for (default: pretrain)",
    )
    parser.add_argument("--output", metavar="DIR", help="directory of the plan (default: plan/ in the run's)")
    parser.add_argument(
        "--rehearse",
        type=int,
        metavar="FACTOR",
        help="then train two steps on as many gloo ranks of this machine, laid out as planned, with the rows "
        "of tables divided by this",
    )
    parser.epilog = (
        "world=2x8 and hardware=h100 are short for plan.world and plan.hardware: hosts and ranks per host, "
        "and a shipped profile (h100, h200, a100, cpu) or a YAML file like theirs"
    )


def _add_row_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split", choices=["train", "valid", "test"], default="test", help="rows to score (default: test)"
    )
    parser.add_argument(
        "--input",
        action="append",
        metavar="PATH",
        help="raw files to score instead: a path or a quoted glob, may be repeated; labels are not needed",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="new directory for the scores (default: in the run's)"
    )


def _run(verb: str, options: argparse.Namespace) -> int:
    try:
        if options.config == DEFAULT_CONFIG and not Path(DEFAULT_CONFIG).exists():
            raise ConfigError(f"{DEFAULT_CONFIG} is not here; name a configuration with --config")
        overrides = _spelt_out(options.overrides) if verb == "plan" else options.overrides
        config = load_config(options.config, overrides)
        # A plan for devices needs none.
        device = "cpu" if verb == "plan" else config.distributed.device
        with start_runtime(device, config.distributed.timeout_seconds) as runtime:
            job = Job(
                config,
                runtime,
                stage=options.stage,
                checkpoint=options.checkpoint,
                split=options.split,
                inputs=options.input,
                output=options.output,
                fresh=options.fresh,
                accept_changes=options.accept_changes,
                with_report=options.with_report,
                delta_from=options.delta_from,
                triton=options.triton,
                rehearse=options.rehearse,
            )
            with show_log(runtime.rank):
                return _run_to_the_end(VERBS[verb][0], job)
    except LostPeerError as error:
        _tell(error)
        return LOST_PEER
    except USER_ERRORS as error:  # before the ranks have met, so all of a host meet the same
        if leads_host():
            _tell(error)
        return FAILED


def _spelt_out(overrides: Sequence[str]) -> list[str]:
    """The overrides of `plan`, whose own section may be left out."""
    short = ("world=", "hardware=")
    return [f"plan.{one}" if one.startswith(short) else one for one in overrides]


def _run_to_the_end(verb: Verb, job: Job) -> int:
    """Runs a verb to its exit code. A rank that failed waits for no other (`Runtime.leave`)."""
    try:
        code = _run_job(verb, job)
    except KeyboardInterrupt:
        job.runtime.leave(_INTERRUPTED)
        raise
    except Exception as error:
        if job.runtime.ends_with_others:
            get_error_handler().record_exception(error)
            traceback.print_exc()
            job.runtime.leave(1)
        raise
    if code:
        job.runtime.leave(code)
    return code


def _run_job(verb: Verb, job: Job) -> int:
    try:
        verb(job)
    except PeerFailedError:
        return LOST_PEER
    except USER_ERRORS as error:
        is_first, loss = job.runtime.is_first_to_fail(), describe_loss(error)
        if is_first and loss is not None:
            _tell_loss(job.runtime.rank, loss)
        elif is_first:
            _tell(error)
        return FAILED if loss is None else LOST_PEER  # a checkpoint that failed because another rank went
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        if job.runtime.is_first_to_fail():
            _tell(_placed(error, job))
        return FAILED
    except Exception as error:
        is_first = job.runtime.is_first_to_fail()
        loss = describe_loss(error)
        if is_first and loss is not None:
            _tell_loss(job.runtime.rank, loss)
        if loss is not None or (isinstance(error, RuntimeError) and not is_first):
            return LOST_PEER  # it broke here because another rank failed
        raise
    return 0


def _placed(error: OSError, job: Job) -> OSError:
    """The error; where it names no file, as of a full disk, with the places that the job writes to."""
    if error.filename is not None:
        return error
    places = [job.output, job.config.run_dir, job.config.data.prepared_dir]
    return OSError(f"{error}; this job writes to {', '.join(place for place in places if place is not None)}")


def _tell_loss(rank: int, loss: str) -> None:
    print(
        f"error: rank {rank} lost another rank: {loss}. What happened to that one stands in its own output, "
        "or in the kernel's log of its host if it was killed for memory. A training that is started again "
        "goes on from its newest checkpoint",
        file=sys.stderr,
        flush=True,
    )


def _tell(error: Exception) -> None:
    get_error_handler().record_exception(error)  # for the summary of torchrun
    print(f"error: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
