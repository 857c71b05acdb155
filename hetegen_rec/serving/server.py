"""`hetegen serve`: an artifact behind HTTP, until a signal ends it."""

import gc
import logging
import signal
import socket
from contextlib import closing
from pathlib import Path

import torch
import uvicorn

from hetegen_rec.config.export import Backend
from hetegen_rec.serving.app import make_app
from hetegen_rec.serving.batching import Batcher
from hetegen_rec.serving.metrics import Metrics
from hetegen_rec.serving.served import ServedArtifact, describe
from hetegen_rec.serving.settings import Settings

logger = logging.getLogger(__name__)

_BACKLOG = 2048


def serve(
    path: str | Path,
    settings: Settings,
    *,
    host: str,
    port: int,
    threads: int,
    backend: Backend | None = None,
    verify: bool = True,
) -> None:
    """Serves an artifact until SIGTERM or SIGINT; requests that are under way are answered first.

    Args:
        path: directory of the artifact.
        settings: limits and times.
        host: address to listen on.
        port: 0 takes a free one.
        threads: that compute one batch.
        backend: to score by; default: the fastest that can run here.
        verify: compare checksums at each load.

    Raises:
        ArtifactError: the artifact cannot be used.
        OSError: the address cannot be listened on.
    """
    torch.set_num_threads(threads)
    metrics = Metrics()
    with (
        closing(
            ServedArtifact(path, metrics, backend=backend, strategy=settings.strategy, verify=verify)
        ) as served,
        closing(Batcher(lambda: served.scorer, settings, metrics)) as batcher,
        _listen(host, port) as listener,
    ):
        _spare_collections()
        _show_log()
        served.watch(settings.watch_seconds)
        signal.signal(signal.SIGHUP, lambda *_: served.ask_reload())
        # uvicorn raises the signal that ended it again; the work is done by then.
        signal.signal(signal.SIGTERM, lambda *_: None)
        config = uvicorn.Config(
            make_app(served, batcher, metrics, settings),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            limit_concurrency=settings.max_connections + 1,  # uvicorn refuses from that many on
            timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        )
        logger.info("serves %s on http://%s:%d", describe(served.scorer), host, listener.getsockname()[1])
        uvicorn.Server(config).run(sockets=[listener])


def _spare_collections() -> None:
    """Keeps the garbage collector from what stays.

    A full collection walks over everything that torch made when it was imported, and nobody is answered
    meanwhile: loading another artifact set one off that took 0.26 s. The price is that the first artifact's
    network, without its tables, stays in memory.
    """
    gc.collect()
    gc.freeze()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


def _show_log() -> None:
    """The log goes to stderr: that of this package, and that of uvicorn."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    for name in ("hetegen_rec", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
