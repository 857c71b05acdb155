"""Arrays on disk: their room is there before anybody writes."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from hetegen_rec.scoring.arrays import map_array, new_array


def test_a_new_array_is_zeros_and_holds_what_is_written(tmp_path: Path) -> None:
    written = new_array(tmp_path / "rows.npy", np.dtype(np.float16), (5, 3))
    written[2] = 7
    written.flush()
    assert map_array(tmp_path / "rows.npy").tolist() == [[7.0 * (row == 2)] * 3 for row in range(5)]


def test_the_room_of_an_array_is_taken_when_it_is_made(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    new_array(path, np.dtype(np.uint8), (1 << 20,))
    assert path.stat().st_blocks * 512 >= path.stat().st_size


def test_an_array_for_which_there_is_no_room_is_an_error_that_names_it(tmp_path: Path, monkeypatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*rows\.npy'"):
        new_array(tmp_path / "rows.npy", np.dtype(np.uint8), (10,))
