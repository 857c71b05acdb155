"""One verb of `hetegen`, as a run of the grid calls it."""

import sys
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

Program: TypeAlias = Callable[[Sequence[str]], int]
"""Words of a command line to an exit code."""


class Configured(Protocol):
    """Whatever has a configuration file and what it changes of it."""

    @property
    def config_path(self) -> str:
        """The file."""

    @property
    def overrides(self) -> Sequence[str]:
        """`key=value` strings."""


def do_verb(program: Program, verb: str, run: Configured, *more: str) -> None:
    """Calls a verb with the configuration of a run; `sys.exit` if that fails."""
    exit_code = program([verb, "--config", run.config_path, *run.overrides, *more])
    if exit_code:
        sys.exit(exit_code)
