"""Arrays on disk, `.npy` files mapped into memory."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray


def map_array(path: Path) -> NDArray[Any]:
    """An array that is there, to be read."""
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def new_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A new array of zeros, to be written.

    Its room on the disk is taken at once: a process that writes to a mapped page for which there is none is
    killed by SIGBUS.

    Raises:
        OSError: there is no room for it; names the file.
    """
    array: np.memmap[Any, Any] = open_memmap(path, mode="w+", dtype=dtype, shape=shape)  # type: ignore[no-untyped-call]
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
    return array
