"""Random numbers of stochastic paths: a hash of seed, path, row and cell, with no state to keep."""

import torch
from torch import Tensor

from hetegen_rec.data.hashing import salt_of, uniform_torch


def path_noise(row_ids: Tensor, num_cells: int, seed: int, path: int) -> Tensor:
    """[B, num_cells] in [0, 1): the same for a row wherever it is scored.

    Args:
        row_ids: [B] index of the row in its split.
        num_cells: of a row.
        seed: another seed gives other numbers.
        path: which path of the row.
    """
    cells = torch.arange(num_cells, device=row_ids.device)
    return uniform_torch(row_ids[:, None] * num_cells + cells, salt_of(f"inference/{seed}/{path}"))
