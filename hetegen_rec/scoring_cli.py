"""`hetegen score ARTIFACT IN OUT`: the verbs that need an artifact and no training code."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from hetegen_rec.config.export import Backend, ScoringStrategy
from hetegen_rec.data.errors import DataError
from hetegen_rec.launching.exit_codes import FAILED
from hetegen_rec.locks import LockedError
from hetegen_rec.scoring.delta import apply_delta
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.scoring.files import score_files
from hetegen_rec.scoring.scorer import Scorer
from hetegen_rec.serving.settings import Settings
from hetegen_rec.verbs import SCORING_VERBS


class MissingPackageError(RuntimeError):
    """A verb needs a package that is not installed."""


_LAST_PORT = 65_535
_LONGEST_MILLISECONDS = 3_600_000
_USER_ERRORS = (ArtifactError, DataError, LockedError, MissingPackageError)


def main(arguments: Sequence[str]) -> int:
    """Runs one of the verbs; returns the exit code."""
    verb = arguments[0]
    options = _parser(verb).parse_args(arguments[1:])
    try:
        _WORK[verb](options)
    except KeyboardInterrupt:
        return 130
    except (*_USER_ERRORS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return 0


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"hetegen {verb}",
        description=SCORING_VERBS[verb],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _OPTIONS[verb](parser)
    return parser


def _add_artifact_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", help="directory that `hetegen export` wrote")
    parser.add_argument(
        "--backend",
        choices=get_args(Backend),
        default=argparse.SUPPRESS,
        help="back end to score with (default: the fastest that can run here)",
    )
    parser.add_argument(
        "--trust", action="store_true", help="do not compare the checksums of all files first"
    )
    parser.add_argument(
        "--strategy",
        choices=get_args(ScoringStrategy),
        default="plain",
        help="test-time strategy to score with; the artifact must hold it",
    )


def _add_score_options(parser: argparse.ArgumentParser) -> None:
    _add_artifact_options(parser)
    parser.add_argument("input", nargs="+", help="Parquet or CSV files: paths, quoted globs or URLs")
    parser.add_argument("output", help="Parquet file to write: columns row_id and probability")


def _add_serve_options(parser: argparse.ArgumentParser) -> None:
    _add_artifact_options(parser)
    default = Settings()
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on; 0 takes a free one")
    for name, value, text in (
        ("max-rows", default.max_rows, "most rows of one request"),
        ("max-bytes", default.max_bytes, "most bytes of the body of one request"),
        ("max-connections", default.max_connections, "most connections open at a time"),
        ("queue-rows", default.queue_rows, "most rows that may wait; a request beyond them is answered 503"),
        ("batch-rows", default.batch_rows, "most rows that are scored together"),
    ):
        parser.add_argument(f"--{name}", type=_positive, metavar="N", default=value, help=text)
    for name, seconds, read, text in (
        ("batch-ms", default.batch_seconds, _milliseconds, "that a request may wait for others"),
        ("deadline-ms", default.deadline_seconds, _some_milliseconds, "until a waiting request gets a 503"),
        ("watch-ms", default.watch_seconds, _milliseconds, "between looks at the path; 0: never"),
    ):
        parser.add_argument(
            f"--{name}", type=read, metavar="MS", default=1e3 * seconds, help=f"milliseconds {text}"
        )
    parser.add_argument(
        "--threads", type=_positive, metavar="N", default=1, help="threads that compute one batch"
    )
    parser.add_argument(
        "--reload-endpoint",
        action="store_true",
        help="answer POST /v1/reload, from whoever reaches the server; SIGHUP reloads too",
    )


def _add_delta_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", type=Path, help="directory of the artifact that the delta was made from")
    parser.add_argument("delta", type=Path, help="directory that `hetegen export --delta-from` wrote")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="new directory of the result (default: it takes the place of the base)",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _milliseconds(text: str) -> float:
    number = float(text)
    if not 0 <= number <= _LONGEST_MILLISECONDS:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and {_LONGEST_MILLISECONDS} milliseconds")
    return number


def _some_milliseconds(text: str) -> float:
    number = _milliseconds(text)
    if not number:
        raise argparse.ArgumentTypeError("0 leaves no time to score")
    return number


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= _LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and {_LAST_PORT}")
    return number


def _score(options: argparse.Namespace) -> None:
    scorer = Scorer.load(options.artifact, backend=_backend(options), verify=not options.trust)
    num_rows = score_files(scorer, options.input, options.output, options.strategy)
    print(f"scored {num_rows:,} rows by {scorer.backend}: {options.output}")


def _serve(options: argparse.Namespace) -> None:
    try:
        from hetegen_rec.serving.server import serve
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"the server needs {error.name}, which is not installed; `make server` in a checkout, or "
            "`pip install --no-deps -r requirements/serve.txt`"
        ) from error
    settings = Settings(
        strategy=options.strategy,
        max_rows=options.max_rows,
        max_bytes=options.max_bytes,
        max_connections=options.max_connections,
        queue_rows=options.queue_rows,
        batch_rows=options.batch_rows,
        batch_seconds=options.batch_ms / 1e3,
        deadline_seconds=options.deadline_ms / 1e3,
        watch_seconds=options.watch_ms / 1e3,
        reload_endpoint=options.reload_endpoint,
    )
    serve(
        options.artifact,
        settings,
        host=options.host,
        port=options.port,
        threads=options.threads,
        backend=_backend(options),
        verify=not options.trust,
    )


def _apply_delta(options: argparse.Namespace) -> None:
    output = getattr(options, "output", None)
    manifest = apply_delta(options.base, options.delta, output)
    print(f"artifact of {manifest.name}, {manifest.stage}, step {manifest.step}: {output or options.base}")


def _backend(options: argparse.Namespace) -> Backend | None:
    return getattr(options, "backend", None)


_OPTIONS: Mapping[str, Callable[[argparse.ArgumentParser], None]] = MappingProxyType(
    {"score": _add_score_options, "serve": _add_serve_options, "apply-delta": _add_delta_options}
)
_WORK: Mapping[str, Callable[[argparse.Namespace], None]] = MappingProxyType(
    {"score": _score, "serve": _serve, "apply-delta": _apply_delta}
)
