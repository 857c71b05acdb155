"""Two nodes on one machine: network namespaces of their own, joined by a cable that can be cut."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
_PORT = 29400  # nobody else is in the namespace
_TCP_RETRIES = "5"  # gives up a dead connection after some 13 s rather than 15 min; torchrun has no limit


def why_not() -> str | None:
    """Why two nodes cannot be made here; None if they can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux and the `ip` command"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"hetegen-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    _ip("netns", "delete", probe)
    return None


@dataclass
class Node:
    """One side of the cable."""

    index: int
    namespace: str
    interface: str
    address: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def torchrun(self, words: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
        """Starts this node's agent, with one rank, in a checkout; what it writes goes to a file."""
        agent = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--local-addr", self.address]
        agent += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{_address(0)}:{_PORT}", "--rdzv_id", "two"]
        agent += ["--rdzv_conf", f"is_host={int(self.index == 0)}"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *agent, *words],
                cwd=CHECKOUT,
                env={**os.environ, "PATH": path, "GLOO_SOCKET_IFNAME": self.interface},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def make(self) -> None:
        """Makes the namespace and plugs the cable's end in."""
        _ip("netns", "add", self.namespace)
        _ip("link", "set", self.interface, "netns", self.namespace)
        _ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", self.interface)
        for interface in ("lo", self.interface):
            _ip("-n", self.namespace, "link", "set", interface, "up")
        setting = f"echo {_TCP_RETRIES} > /proc/sys/net/ipv4/tcp_retries2"
        _ip("netns", "exec", self.namespace, "sh", "-c", setting)

    def remove(self) -> None:
        """Ends every process in the namespace and removes it."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        )
        for process in listed.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        for process in self.started:
            process.wait()
        subprocess.run(["ip", "netns", "delete", self.namespace], capture_output=True, check=False)


@dataclass
class Nodes:
    """Both nodes and the cable between them."""

    first: Node
    second: Node

    def cut(self) -> None:
        """Cuts the cable: from now on each waits for the other in vain."""
        _ip("-n", self.second.namespace, "link", "set", self.second.interface, "down")

    def mend(self) -> None:
        """Makes the cable whole again."""
        _ip("-n", self.second.namespace, "link", "set", self.second.interface, "up")


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Context with two nodes; nothing of them is left at its end, whatever happens."""
    first, second = (
        Node(index, f"hetegen-{os.getpid()}-{index}", f"hg{os.getpid()}v{index}", _address(index))
        for index in range(2)
    )
    try:
        _ip("link", "add", first.interface, "type", "veth", "peer", "name", second.interface)
        first.make()
        second.make()
        yield Nodes(first, second)
    finally:
        first.remove()
        second.remove()
        # It goes with the namespaces, unless it was never plugged in.
        subprocess.run(["ip", "link", "delete", first.interface], capture_output=True, check=False)


def _address(index: int) -> str:
    return f"10.77.0.{index + 1}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
