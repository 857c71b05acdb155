"""Starting this program again as several processes on this machine."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn


def relaunch(module: str, ranks: int, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by `ranks` copies of `python -m module arguments` under torchrun.

    Args:
        module: dotted name of a module that runs as a script.
        ranks: processes on this machine.
        arguments: command line of each.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "-m", module, *arguments]
    # torchrun warns unless this is set; each process takes its share of the cores itself.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)
