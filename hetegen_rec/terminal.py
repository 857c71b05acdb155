"""What reaches the terminal: results on stdout; the log and progress bars on stderr; no library's noise."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.logging import RichHandler

WIDTH_OF_FILES = 120
"""Columns of tables that go to a file or a pipe."""

_LOGGER = logging.getLogger("hetegen_rec")


@cache
def results() -> Console:
    """Where tables and paths of results go."""
    return _console(stderr=False)


@cache
def messages() -> Console:
    """Where the log and progress bars go: one console, so that a line of the log does not cut a bar."""
    return _console(stderr=True)


@contextmanager
def show_log(rank: int) -> Iterator[None]:
    """Context in which rank 0 tells what it does, and the others of trouble only.

    Other packages' loggers stay as they are.
    """
    handler: logging.Handler
    if messages().is_terminal:
        handler = RichHandler(
            console=messages(), show_path=False, show_level=False, log_time_format="%H:%M:%S"
        )
        text = "%(message)s"
    else:
        handler = logging.StreamHandler()
        text = "%(asctime)s %(message)s"
    handler.setFormatter(logging.Formatter(text if rank == 0 else f"[rank {rank}] {text}", "%H:%M:%S"))
    before = _LOGGER.handlers, _LOGGER.level, _LOGGER.propagate
    _LOGGER.handlers, _LOGGER.propagate = [handler], False
    _LOGGER.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    try:
        yield
    finally:
        _LOGGER.handlers, _LOGGER.level, _LOGGER.propagate = before


def quiet_libraries() -> None:
    """Silences what PyTorch tells TorchRec's developers about each other's interfaces."""
    for message in (
        "`broadcast_buffers` is deprecated",
        "Please use DTensor instead",
        ".*(reduce_scatter|all_gather_into)_tensor.* is deprecated",
        ".*treespec, LeafSpec.* is deprecated",
    ):
        warnings.filterwarnings("ignore", message, FutureWarning)
    warnings.filterwarnings("ignore", "fbgemm::dense_embedding_codegen", UserWarning)
    # "is_fx_tracing will return true for both ..."
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    # Which ranks share a host, and that replicated tables need no cache: as warnings, on every rank.
    for name in ("comm", "utils"):
        logging.getLogger(f"torchrec.distributed.{name}").setLevel(logging.ERROR)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=WIDTH_OF_FILES)
