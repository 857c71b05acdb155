"""Starting this program again as several processes on this machine."""

import logging
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def relaunch(module: str, ranks: int, arguments: Sequence[str]) -> int:
    """Runs `ranks` copies of `python -m module arguments`, as torchrun does, and waits for them.

    Args:
        module: dotted name of a module that runs as a script.
        ranks: processes on this machine.
        arguments: command line of each.

    Returns:
        0, or the exit code of the process that failed first.
    """
    # The processes tell themselves what went wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        return _exit_code(*error.get_first_failure())
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _exit_code(rank: int, failure: ProcessFailure) -> int:
    if failure.exitcode >= 0:
        return failure.exitcode
    name = signal.Signals(-failure.exitcode).name
    print(f"error: rank {rank} was ended by {name}", file=sys.stderr)
    return 128 - failure.exitcode
