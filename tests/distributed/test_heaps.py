"""What malloc keeps: few heaps, what a step frees, and nothing that was given back."""

import ctypes
import os
from threading import Barrier, Thread

import psutil
import pytest
import torch
from multirank import run_ranks

from hetegen_rec.distributed.heaps import give_back_memory
from hetegen_rec.distributed.runtime import start_runtime


def _set_variable(name: str, setting: str | None) -> None:
    os.environ.pop(name, None)
    if setting is not None:
        os.environ[name] = setting


def _heaps_of_seven_threads(setting: str | None) -> int:
    """How many heaps malloc has, after that many threads were there at a time."""
    _set_variable("MALLOC_ARENA_MAX", setting)
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


class _Malloc(ctypes.Structure):
    """What mallinfo2 tells (malloc.h)."""

    _names = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks"]
    _fields_ = [(name, ctypes.c_size_t) for name in [*_names, "keepcost"]]


def _where_a_block_goes(setting: str | None) -> tuple[int, int]:
    """Bytes that malloc takes beside its heaps for a block of 31 MiB, and that its heaps lose after it."""
    _set_variable("MALLOC_TRIM_THRESHOLD_", setting)
    look = ctypes.CDLL(None).mallinfo2
    look.restype = _Malloc
    with start_runtime("cpu", timeout_seconds=20):
        before = look()
        block = torch.ones(31 << 18)
        there = look()
        del block
        return there.hblkhd - before.hblkhd, there.arena - look().arena


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this C library has no mallinfo2")
def test_malloc_keeps_the_blocks_of_a_step_unless_the_environment_says_otherwise() -> None:
    assert run_ranks(1, _where_a_block_goes, None) == [(0, 0)]
    # Here too the variable comes too late for the C library, which then goes by itself.
    ((beside, _),) = run_ranks(1, _where_a_block_goes, "1")
    assert beside >= 31 << 20


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library has no malloc_trim")
def test_memory_that_nobody_holds_is_given_back() -> None:
    kept, size = 10, 1000  # what is kept keeps malloc from giving back what lies below it
    held = [bytes(size) for _ in range(100_000)]
    del held[:-kept]
    before = psutil.Process().memory_info().rss
    give_back_memory()
    assert before - psutil.Process().memory_info().rss > 50_000 * size
