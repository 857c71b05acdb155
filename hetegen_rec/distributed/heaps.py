"""Memory that malloc keeps for later. On C libraries other than glibc nothing here has an effect."""

import ctypes
from collections.abc import Mapping

TRIM_THRESHOLD, MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # mallopt's names of settings (malloc.h)
_HEAPS = 2
_LARGEST_IN_HEAP = 32 << 20  # bytes; the most that mallopt takes
_NEVER = -1


def set_up_malloc(environment: Mapping[str, str]) -> None:
    """Has threads share heaps, and these keep what is freed, as far as the environment leaves that open."""
    if "MALLOC_ARENA_MAX" not in environment:
        share_heaps()
    if not environment.keys() & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}:
        keep_freed_blocks()


def share_heaps() -> None:
    """Has all threads of the process share a few heaps.

    glibc gives threads heaps of their own and keeps what they leave in them. Readers' threads come and go
    with every epoch and evaluation, so that memory would grow for hours.
    """
    set_malloc(_ARENA_MAX, _HEAPS)


def keep_freed_blocks() -> None:
    """Keeps what a step frees for the next one, whose tensors are of the same sizes.

    glibc gives blocks of some megabytes back to the system as soon as they are free. Every step would take
    its activations anew, and the system would clear each page at its first touch: thousands a step.
    """
    set_malloc(MMAP_THRESHOLD, _LARGEST_IN_HEAP)
    set_malloc(TRIM_THRESHOLD, _NEVER)


def give_back_memory() -> None:
    """Gives memory that nobody holds any more, and that malloc keeps, back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def set_malloc(setting: int, value: int) -> None:
    """Changes one of malloc's settings for the whole process."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(setting, value)
