"""Measures one scenario: `python -m benchmarks.run NAME`, also under torchrun. See docs/benchmarks.md."""

import sys
from collections.abc import Sequence
from importlib import import_module

from benchmarks.throughput import runner
from benchmarks.throughput.scenario import PROGRAMS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the scenario that the first argument names; returns an exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in PROGRAMS:
        return int(import_module(PROGRAMS[given[0]]).main(given[1:]))
    return runner.main(given)


if __name__ == "__main__":
    sys.exit(main())
