"""Which commit the package runs from, for what is kept of a run."""

import shutil
import subprocess
from pathlib import Path


def describe_checkout(digits: int) -> str | None:
    """The commit of the checkout that the package runs from, marked `-dirty` if files differ from it.

    Args:
        digits: least digits of its name.

    Returns:
        None where the package was installed without its repository, or there is no git.
    """
    checkout = Path(__file__).parents[1]
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", f"--abbrev={digits}"]
    described = subprocess.run(command, capture_output=True, text=True, check=False)
    return described.stdout.strip() or None
