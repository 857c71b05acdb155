"""A process that has imported what ranks need, and that ranks are forks of.

Importing torch and torchrec takes longer than most jobs of the tests. Forking is safe because this process
does nothing but import and fork, in one thread. What a rank gets from it are modules alone: session,
environment, directory, output and random numbers are its own, and it ends as a process of Python does.
"""

import faulthandler
import gc
import importlib
import importlib.util
import os
import pickle
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

IMPORTED = ("hetegen_rec.cli", "torch._dynamo", "pytest", "hypothesis")
"""What is there from a rank's first moment on. The first optimizer of a process imports `torch._dynamo`."""


@dataclass(frozen=True)
class Request:
    """A rank that is asked for."""

    call: Path
    """Holds the file of a module, the name of a function in it, and arguments; pickled."""
    result: Path
    """Where what the function returns is pickled."""
    output: Path
    """Where what the rank writes is added."""
    directory: Path
    """Where it runs."""
    environment: dict[str, str]
    """All of it."""


def serve(descriptor: int) -> None:
    """Makes one rank after the other, until the other side of a connection is closed.

    Says so once it can begin. Then answers every `Request` by the exit code of the rank, when that has ended.
    Anything else that comes before ends it.
    """
    for name in IMPORTED:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        sys.exit(f"{len(threads)} threads are there after importing; a fork would lack all but one")
    gc.collect()
    gc.freeze()  # or every rank would go through all that is imported when it ends, for seconds
    asked = connection.Connection(descriptor)
    asked.send("ready")
    request = _request_of_fork(asked)
    if request is not None:
        _be_rank(request)


def _request_of_fork(asked: "connection.Connection[Any, Any]") -> Request | None:
    """Returns in every fork, with what it is to do, and here at the end, with nothing."""
    with suppress(EOFError, ConnectionError):
        while True:
            request = asked.recv()
            if not isinstance(request, Request):
                continue  # the rank that it was to end had ended
            pid = os.fork()
            if pid == 0:
                asked.close()
                return request
            asked.send(_exit_code(pid, asked))
    return None


def _exit_code(pid: int, asked: "connection.Connection[Any, Any]") -> int:
    """Waits until a rank has ended, or is to be ended; of its session nothing is left then."""
    ended = os.pidfd_open(pid)
    connection.wait([ended, asked])
    os.close(ended)
    # Its id is its own, and that of the session, until it is waited for.
    os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _be_rank(request: Request) -> None:
    os.setsid()
    with request.output.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    faulthandler.enable()  # where a crashed rank stood
    os.chdir(request.directory)
    os.environ.clear()
    os.environ.update(request.environment)
    _draw_seeds()
    source, name, arguments = pickle.loads(request.call.read_bytes())
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    result = getattr(module, name)(*arguments)
    request.result.write_bytes(pickle.dumps(result))


def _draw_seeds() -> None:
    """As a new process does. `random` does so in every fork by itself."""
    import numpy as np
    import torch

    np.random.seed()
    torch.seed()
