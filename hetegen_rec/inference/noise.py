"""Random numbers of stochastic paths: a hash of seed, path, row and cell, with no state to keep."""

import torch
from torch import Tensor

from hetegen_rec.data.hashing import mix64_torch, salt_of, uniform_torch

_KEY_SALT = salt_of("inference/row")


def row_keys(ids: Tensor) -> Tensor:
    """[B] int64: a hash of what a row holds, the sum of the hashes of its cells modulo 2**64.

    Args:
        ids: [B, T] of its tokens, -1 where there is none.
    """
    num_tokens = ids.shape[1]
    cells = ids * num_tokens + torch.arange(num_tokens, device=ids.device)  # differs for all (id, place)
    return mix64_torch(cells, _KEY_SALT).sum(1)


def path_noise(keys: Tensor, num_cells: int, seed: int, path: int) -> Tensor:
    """[B, num_cells] in [0, 1): the same for equal rows, wherever they are scored.

    Args:
        keys: [B] of `row_keys`.
        num_cells: of a row.
        seed: another seed gives other numbers.
        path: which path of the row.
    """
    cells = torch.arange(num_cells, device=keys.device)
    return uniform_torch(keys[:, None] * num_cells + cells, salt_of(f"inference/{seed}/{path}"))
