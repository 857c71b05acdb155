"""Runs a function on n gloo ranks of this machine, under a hard time limit."""

import atexit
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import Any

from rank_server import Request

DEFAULT_TIMEOUT = 240.0
_GRACE = 10.0  # seconds for the others to notice that a rank failed
_TESTS = Path(__file__).parent
_SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(_TESTS.parent), str(_TESTS)]),
}


class RanksFailedError(AssertionError):
    """A rank failed or the time was up. The message holds what every rank wrote."""


def run_ranks(
    num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = DEFAULT_TIMEOUT
) -> list[Any]:
    """Calls a function of a test module on every rank of a new job, and returns its results by rank.

    The function finds the launcher's environment and starts the runtime itself. Arguments and results
    are pickled.

    Raises:
        RanksFailedError: a rank ended with an error, or `timeout` seconds were not enough. All ranks and
            their children are gone then.
    """
    servers = _ready_servers(num_ranks)
    with tempfile.TemporaryDirectory() as name:
        requests = _requests(num_ranks, Path(name))
        codes = _codes_of(servers, requests, function, arguments, timeout)
        if any(codes):
            raise _failure(requests, function, f"exit codes {codes}")
        return [pickle.loads(request.result.read_bytes()) for request in requests]


@dataclass(frozen=True)
class End:
    """How a process ended."""

    code: int
    """Its exit code; negative for the signal that ended it."""
    output: str
    """What it wrote, to stdout and to stderr."""


def end_of(function: Callable[..., Any], *arguments: Any, timeout: float = DEFAULT_TIMEOUT) -> End:
    """Calls a function of a test module in a process of its own, and tells how that ended, however it did.

    Raises:
        RanksFailedError: `timeout` seconds were not enough. The process and its children are gone then.
    """
    (end,) = ends_of(1, function, *arguments, timeout=timeout)
    return end


def ends_of(
    num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = DEFAULT_TIMEOUT
) -> list[End]:
    """As `run_ranks`, but tells how every rank ended, however it did."""
    servers = _ready_servers(num_ranks)
    with tempfile.TemporaryDirectory() as name:
        requests = _requests(num_ranks, Path(name))
        codes = _codes_of(servers, requests, function, arguments, timeout)
        outputs = [request.output.read_text(errors="replace") for request in requests]
        return [End(code, output) for code, output in zip(codes, outputs, strict=True)]


class _Server:
    """This side of a `rank_server`, which ends with it."""

    def __init__(self) -> None:
        self.connection, other = Pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import rank_server; rank_server.serve({other.fileno()})"],
            cwd=_TESTS,
            # The allocator that pyarrow brings along, and does not use, would have a thread.
            env=os.environ | _SETTINGS | {"JE_ARROW_MALLOC_CONF": "background_thread:false"},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=[other.fileno()],
            start_new_session=True,
        )
        other.close()
        self._is_ready = False
        self._exit_code: int | None = 0

    def wait_until_ready(self) -> None:
        """Waits until all is imported."""
        if not self._is_ready:
            self._is_ready = self._receive() == "ready"

    def start(self, request: Request) -> None:
        """Makes a rank."""
        self._exit_code = None
        self.connection.send(request)

    def take_exit_code(self) -> int:
        """Waits until the rank has ended."""
        if self._exit_code is None:
            self._exit_code = self._receive()
        return self._exit_code

    def end(self) -> int:
        """Ends the rank, if it has not ended yet, with its children; the exit code."""
        if self._exit_code is None:
            self.connection.send("end")
        return self.take_exit_code()

    def close(self) -> None:
        self.connection.close()
        self._process.wait()

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError) as error:
            self._output.seek(0)
            text = self._output.read().decode(errors="replace")
            raise RuntimeError(f"the process that ranks are forks of has ended:\n{text}") from error


_servers: dict[int, _Server] = {}


def _server_of(rank: int) -> _Server:
    """One for each index, so that the ranks of a job differ in their hashes of strings, as real ones do."""
    if rank not in _servers:
        _servers[rank] = _Server()
    return _servers[rank]


@atexit.register
def _close_servers() -> None:
    for server in _servers.values():
        server.close()


def _ready_servers(num_ranks: int) -> list[_Server]:
    servers = [_server_of(rank) for rank in range(num_ranks)]
    for server in servers:
        server.wait_until_ready()
    return servers


def _codes_of(
    servers: Sequence[_Server],
    requests: Sequence[Request],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    timeout: float,
) -> list[int]:
    """Has a function called by the ranks of a job; their exit codes, once all have ended."""
    source = sys.modules[function.__module__].__file__
    requests[0].call.write_bytes(pickle.dumps((source, function.__name__, arguments)))
    try:
        for server, request in zip(servers, requests, strict=True):
            server.start(request)
        in_time = _wait(servers, timeout)
    finally:
        codes = [server.end() for server in servers]
    if not in_time:
        raise _failure(requests, function, f"not done after {timeout} s")
    return codes


def _failure(requests: Sequence[Request], function: Callable[..., Any], reason: str) -> RanksFailedError:
    texts = "\n".join(f"--- rank {rank} ---\n{_last_words(one)}" for rank, one in enumerate(requests))
    return RanksFailedError(f"{len(requests)} ranks of {function.__name__}: {reason}\n{texts}")


def _requests(num_ranks: int, directory: Path) -> list[Request]:
    port = str(_free_port())
    return [
        Request(
            call=directory / "call",
            result=directory / f"result-{rank}",
            output=directory / f"output-{rank}",
            directory=Path.cwd(),
            environment=os.environ
            | _SETTINGS
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(num_ranks)
    ]


def _wait(servers: Sequence[_Server], timeout: float) -> bool:
    """Waits for all, or for the limit; once a rank has failed the others get a short grace."""
    running = {server.connection: server for server in servers}
    deadline = time.monotonic() + timeout
    failed = False
    while running and time.monotonic() < deadline:
        for told in connection.wait([*running], deadline - time.monotonic()):
            code = running.pop(told).take_exit_code()
            if code and not failed:
                failed = True
                deadline = min(deadline, time.monotonic() + _GRACE)
    return failed or not running


def _last_words(request: Request) -> str:
    """The end of what a rank wrote."""
    return request.output.read_text(errors="replace")[-4000:] if request.output.exists() else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
