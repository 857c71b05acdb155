"""Reductions over the ranks of the default process group; the identity in a process alone."""

import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """Number of ranks that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over ranks, detached; every rank gets the same bits."""
    total = values.detach().clone()
    if num_ranks() > 1:
        dist.all_reduce(total)
    return total


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean over ranks, detached."""
    return sum_over_ranks(values) / num_ranks()
