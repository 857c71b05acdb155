"""A port for the hosts of a job to meet on."""

import random
import socket

# Below 32768, where Linux starts to hand out ports to outgoing connections: a port from there could
# be taken between now and the moment the job listens on it.
_PORTS = range(20_000, 32_000)
_MAX_TRIES = 100


def choose_port() -> int:
    """A random TCP port that nothing listens on here.

    The host that will listen may be another one. A random port is a good guess there too, and a better
    one than a fixed port, on which two jobs that share a host always collide.

    Raises:
        OSError: no free port was found.
    """
    # SystemRandom: a seeded `random` must not make all jobs choose the same port.
    for port in random.SystemRandom().sample(_PORTS, _MAX_TRIES):
        if _is_free(port):
            return port
    raise OSError(f"none of {_MAX_TRIES} ports tried between {_PORTS.start} and {_PORTS.stop} is free")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        # As torch's store does: a port of a job that just ended is free again.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True
