"""Memory that malloc keeps for later. On C libraries other than glibc nothing here has an effect."""

import ctypes

_M_ARENA_MAX, _HEAPS = -8, 2  # mallopt's name of the setting (malloc.h), and what it is set to


def share_heaps() -> None:
    """Has all threads of the process share a few heaps.

    glibc gives threads heaps of their own and keeps what they leave in them. Readers' threads come and go
    with every epoch and evaluation, so that memory would grow for hours.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _HEAPS)


def give_back_memory() -> None:
    """Gives memory that nobody holds any more, and that malloc keeps, back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
