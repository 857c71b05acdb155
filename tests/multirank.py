"""Runs a function or a script on n gloo ranks of this machine, under a hard time limit."""

import contextlib
import importlib.util
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DEFAULT_TIMEOUT = 240.0
_GRACE = 10.0  # seconds for the others to notice that a rank failed
_TESTS = Path(__file__).parent


class RanksFailedError(AssertionError):
    """A rank failed or the time was up. The message holds what every rank wrote."""


def run_ranks(
    num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = DEFAULT_TIMEOUT
) -> list[Any]:
    """Calls a function of a test module on every rank of a new job, and returns its results by rank.

    The function finds the launcher's environment and starts the runtime itself. Arguments and results
    are pickled.
    """
    with tempfile.TemporaryDirectory() as directory:
        call = Path(directory) / "call"
        source = sys.modules[function.__module__].__file__
        call.write_bytes(pickle.dumps((source, function.__name__, arguments)))
        run_script(num_ranks, [__file__, str(call)], timeout=timeout)
        return [pickle.loads(Path(f"{call}.{rank}").read_bytes()) for rank in range(num_ranks)]


def run_script(num_ranks: int, command: Sequence[str], *, timeout: float = DEFAULT_TIMEOUT) -> list[str]:
    """Runs `python COMMAND...` on every rank of a new job, and returns what each wrote, by rank.

    Raises:
        RanksFailedError: a rank ended with an error, or `timeout` seconds were not enough. All ranks and
            their children are gone then.
    """
    port = _free_port()
    ranks = [_start(rank, num_ranks, port, command) for rank in range(num_ranks)]
    try:
        in_time = _wait(ranks, timeout)
    finally:
        for process, _ in ranks:
            _kill_group(process)
    outputs = [_read(output) for _, output in ranks]
    codes = [process.wait() for process, _ in ranks]
    if not in_time or any(codes):
        reason = f"exit codes {codes}" if in_time else f"not done after {timeout} s"
        texts = "\n".join(f"--- rank {rank} ---\n{text[-4000:]}" for rank, text in enumerate(outputs))
        raise RanksFailedError(f"{num_ranks} ranks of {' '.join(command)}: {reason}\n{texts}")
    return outputs


def _start(
    rank: int, num_ranks: int, port: int, command: Sequence[str]
) -> tuple[subprocess.Popen[bytes], Any]:
    output = tempfile.TemporaryFile()  # noqa: SIM115 - read at the end; an unread pipe would block
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",  # where a crashed rank stood
        "PYTHONPATH": os.pathsep.join([str(_TESTS.parent), str(_TESTS)]),
    }
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return process, output


def _wait(ranks: list[tuple[subprocess.Popen[bytes], Any]], timeout: float) -> bool:
    """Waits for all, or for the limit; once a rank has failed the others get a short grace."""
    deadline = time.monotonic() + timeout
    failed = False
    while time.monotonic() < deadline:
        codes = [process.poll() for process, _ in ranks]
        if None not in codes:
            return True
        if any(codes) and not failed:
            failed = True
            deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.05)
    return failed


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # ended, with all its children
        os.killpg(process.pid, signal.SIGKILL)


def _read(output: Any) -> str:
    output.seek(0)
    text: str = output.read().decode(errors="replace")
    output.close()
    return text


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _call(path: str) -> None:
    """Body of one rank: calls what `run_ranks` asked for and leaves the result beside the request."""
    source, name, arguments = pickle.loads(Path(path).read_bytes())
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    result = getattr(module, name)(*arguments)
    Path(f"{path}.{os.environ['RANK']}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _call(sys.argv[1])
