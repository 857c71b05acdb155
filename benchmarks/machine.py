"""What a benchmark ran on, and by what code, for its page."""

import os
import platform
import shlex
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from hetegen_rec.checkout import describe_checkout

_PACKAGES = ("torch", "torchrec")


def machine() -> str:
    """Cores, processor and versions in one phrase."""
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"{os.cpu_count()} cores of {processor()}, Python {platform.python_version()}, {packages}"


def commit() -> str:
    """The commit of the code, marked if files differ from it; `unknown` outside of a checkout."""
    return describe_checkout(digits=7) or "unknown"


def how_made(program: str, arguments: Sequence[str]) -> str:
    """A sentence for a page: the command that made it, with the commit, the day and the machine.

    Args:
        program: name of its module.
        arguments: that it was started with.
    """
    command = shlex.join(["python", "-m", program, *arguments])
    return f"`{command}` at commit {commit()}, {date.today()}, on {machine()}."


def processor() -> str:
    """Its name, as the system knows it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
