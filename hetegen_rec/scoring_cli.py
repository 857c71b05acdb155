"""`hetegen score ARTIFACT IN OUT`: the verbs that need an artifact and no training code."""

import argparse
import sys
from collections.abc import Sequence

from hetegen_rec.config.export import Backend
from hetegen_rec.data.raw import DataError
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.scoring.files import score_files
from hetegen_rec.scoring.scorer import Scorer
from hetegen_rec.verbs import SCORING_VERBS

FAILED = 2
_BACKENDS: tuple[Backend, ...] = ("aten", "fbgemm", "aoti")
_USER_ERRORS = (ArtifactError, DataError)


def main(arguments: Sequence[str]) -> int:
    """Runs `score`; returns the exit code."""
    options = _parser(arguments[0]).parse_args(arguments[1:])
    try:
        _score(options)
    except KeyboardInterrupt:
        return 130
    except (*_USER_ERRORS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return 0


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"hetegen {verb}", description=SCORING_VERBS[verb])
    parser.add_argument("artifact", help="directory that `hetegen export` wrote")
    parser.add_argument("--backend", choices=_BACKENDS, help="default: the fastest that can run here")
    parser.add_argument(
        "--trust", action="store_true", help="do not read every file once to compare its checksum"
    )
    parser.add_argument("input", nargs="+", help="Parquet or CSV files: paths, quoted globs or URLs")
    parser.add_argument("output", help="Parquet file to write: columns row_id and probability")
    return parser


def _score(options: argparse.Namespace) -> None:
    scorer = Scorer.load(options.artifact, backend=options.backend, verify=not options.trust)
    num_rows = score_files(scorer, options.input, options.output)
    print(f"scored {num_rows:,} rows by {scorer.backend}: {options.output}")
