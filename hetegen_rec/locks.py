"""Directories that one process at a time writes, also across the hosts of a shared file system."""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

logger = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class LockedError(RuntimeError):
    """Another process holds the lock. The message names it."""


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Context in which this process alone holds the lock of a directory, which need not exist.

    The lock is an advisory one on `.NAME.lock` beside the directory. The system lets go of it when the
    process ends, however it ends, so it is never stale. Where the file system knows no locks, a warning
    is logged and the context goes on without one.

    Raises:
        LockedError: it is held, by this or another process; tells host, process and since when.
        OSError: the lock's file cannot be written.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    # The file stays behind: whoever waits for a removed one would hold a lock that nobody else sees.
    file = os.open(directory.with_name(f".{directory.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(file, directory)
        os.ftruncate(file, 0)
        os.pwrite(file, _about_this_process(), 0)
        yield
    finally:
        os.close(file)


def _lock(file: int, directory: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LockedError(
            f"{directory}: in use by {_holder(file)}; wait for it to end, stop it, or name another directory"
        ) from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning(
            "%s: its file system has no locks (%s); do not start a second job on it", directory, error
        )


def _about_this_process() -> bytes:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode()


def _holder(file: int) -> str:
    try:
        about = json.loads(os.pread(file, 4096, 0))
    except ValueError:  # it has the lock, but has not written yet who it is
        return "another process"
    return f"process {about['pid']} on {about['host']} since {about['since']}"
