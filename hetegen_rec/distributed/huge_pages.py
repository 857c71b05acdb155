"""Huge pages for what is read at random. Before Linux 6.1 and on other systems this has no effect."""

import ctypes

import torch

_COLLAPSE = 25  # madvise's MADV_COLLAPSE (asm-generic/mman-common.h)
_HUGE_PAGE = 2 << 20  # bytes, where an ordinary page has 4 KiB


def use_huge_pages(tensor: torch.Tensor) -> None:
    """Moves a tensor's memory to huge pages, as far as the system has some; what it holds stays.

    The rows of a batch lie on as many pages of a large table. A processor knows by heart where a few thousand
    pages are; for the others it must look in memory before it can read there.

    Args:
        tensor: contiguous, on CPU.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    size = (tensor.data_ptr() + tensor.nbytes - start) // _HUGE_PAGE * _HUGE_PAGE
    if madvise is not None and size > 0:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _COLLAPSE)
