"""`hetegen VERB --config FILE key=value ...`: every verb of the project as one command."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.logging import RichHandler

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.loading import load_config
from hetegen_rec.data.raw import DataError
from hetegen_rec.data.sources import SourceError
from hetegen_rec.distributed.planning import PlanningError
from hetegen_rec.distributed.runtime import DistributedError, Runtime, start_runtime
from hetegen_rec.evaluation.errors import EvaluationError
from hetegen_rec.jobs import Job, demo, evaluate, predict, prepare_data, report, train
from hetegen_rec.launching.relaunch import relaunch
from hetegen_rec.training.checkpoint import CheckpointError

DEFAULT_CONFIG = "configs/movielens_100k.yaml"

USER_ERRORS = (
    CheckpointError,
    ConfigError,
    DataError,
    DistributedError,
    EvaluationError,
    PlanningError,
    SourceError,
)
"""Errors whose message is enough for the person who sees it; a traceback would only hide it."""

Verb = Callable[[Job], None]

VERBS: dict[str, tuple[Verb, str]] = {
    "prepare": (prepare_data, "count and encode raw data into shards of integer ids"),
    "pretrain": (train("pretrain"), "generative pre-training by discrete diffusion"),
    "finetune": (train("finetune"), "click training from the pre-trained model"),
    "joint": (train("joint"), "clicks and reconstruction in one stage"),
    "scratch": (train("scratch"), "the baseline: click training of the same network from nothing"),
    "evaluate": (evaluate, "AUC, LogLoss, GAUC, calibration and slices of a trained stage"),
    "predict": (predict, "write the click probability of every row to Parquet"),
    "report": (report, "collect what a run directory holds into report.html"),
    "demo": (demo, "pre-train, fine-tune, compare with from-scratch, report"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="hetegen", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (_, text) in VERBS.items():
        _add_options(verbs.add_parser(name, help=text, description=text))
    options = parser.parse_args(arguments)
    return _run(options)


def launch(verb: str) -> None:
    """What the scripts under launch/ call; ends the process with the verb's exit code."""
    sys.exit(main([verb, *sys.argv[1:]]))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default=DEFAULT_CONFIG, help=f"YAML file (default {DEFAULT_CONFIG})")
    parser.add_argument(
        "--ranks", type=int, default=0, help="start this many processes on this machine (default: one)"
    )
    parser.add_argument("--stage", choices=["pretrain", "finetune", "joint", "scratch"])
    parser.add_argument("--checkpoint", help="a checkpoint's directory (default: the stage's best)")
    parser.add_argument("--split", choices=["train", "valid", "test"], default="test")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.max_steps=4")


def _run(options: argparse.Namespace) -> int:
    if options.ranks > 1:
        relaunch("hetegen_rec.cli", options.ranks, _arguments_of_one_rank(options))
    if not Path(options.config).exists() and options.config == DEFAULT_CONFIG:
        print(f"error: {DEFAULT_CONFIG} is not here; name a configuration with --config", file=sys.stderr)
        return 2
    verb = VERBS[options.verb][0]
    try:
        config = load_config(options.config, options.overrides)
        with start_runtime(config.distributed.device, config.distributed.timeout_seconds) as runtime:
            _start_logging(runtime)
            verb(Job(config, runtime, options.stage, options.checkpoint, options.split))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _arguments_of_one_rank(options: argparse.Namespace) -> list[str]:
    arguments = [options.verb, "--config", options.config, "--split", options.split]
    for name in ("stage", "checkpoint"):
        if getattr(options, name):
            arguments += [f"--{name}", getattr(options, name)]
    return [*arguments, *options.overrides]


def _start_logging(runtime: Runtime) -> None:
    """Rank 0 speaks; the others only of trouble."""
    level = logging.INFO if runtime.is_main else logging.WARNING
    handler = RichHandler(show_path=False, show_level=False, log_time_format="%H:%M:%S")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("hetegen_rec").setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
