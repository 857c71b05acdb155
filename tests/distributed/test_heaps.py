"""What malloc keeps: few heaps, and nothing that was given back."""

import ctypes
import os
from threading import Barrier, Thread

import psutil
import pytest
from multirank import run_ranks

from hetegen_rec.distributed.heaps import give_back_memory
from hetegen_rec.distributed.runtime import start_runtime


def _heaps_of_seven_threads(setting: str | None) -> int:
    """How many heaps malloc has, after that many threads were there at a time."""
    os.environ.pop("MALLOC_ARENA_MAX", None)
    if setting is not None:
        os.environ["MALLOC_ARENA_MAX"] = setting
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.open_memstream.restype = ctypes.c_void_p
    all_there = Barrier(6)

    def take() -> None:
        libc.malloc(ctypes.c_size_t(1000))
        all_there.wait()

    with start_runtime("cpu", timeout_seconds=20):
        threads = [Thread(target=take) for _ in range(all_there.parties)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        text, size = ctypes.c_char_p(), ctypes.c_size_t()
        stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        return (text.value or b"").count(b"<heap nr=")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_threads_share_heaps_unless_the_environment_says_how_many() -> None:
    assert run_ranks(1, _heaps_of_seven_threads, None) == [2]
    # The C library reads the variable when a program starts; here it is set later, and so only keeps us away.
    (heaps,) = run_ranks(1, _heaps_of_seven_threads, "8")
    assert heaps > 2


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library has no malloc_trim")
def test_memory_that_nobody_holds_is_given_back() -> None:
    kept, size = 10, 1000  # what is kept keeps malloc from giving back what lies below it
    held = [bytes(size) for _ in range(100_000)]
    del held[:-kept]
    before = psutil.Process().memory_info().rss
    give_back_memory()
    assert before - psutil.Process().memory_info().rss > 50_000 * size
