"""One form of a table's optimizer state, sharded or replicated: a checkpoint of either fits the other."""

from collections.abc import Mapping
from typing import Any

import torch

_TABLES = ".embedding_bags."


def canonical_optimizer_state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with replicated tables' state as a sharded table has it.

    A sharded table keeps what Adagrad sums up as `<table>.momentum1`, of shape [rows], or [rows, dim] unless
    row-wise. A replicated one keeps it as `sum`, of shape [rows, 1] or [rows, dim], beside a `step` that
    matters only under a decay of the learning rate, which tables do not have. Plain SGD has an empty entry
    for the one and none for the other, so parameters without state are left out. All other state stays as it
    is; Adam's names differ between the two as well, and are not translated.

    Args:
        state_dict: of an optimizer from `make_optimizer`.

    Returns:
        The same tensors, or views of them: what is loaded into the result is loaded into the optimizer.
    """
    state = {
        name: _as_if_sharded(name, tensors) if _TABLES in f".{name}" else tensors
        for name, tensors in state_dict["state"].items()
        if tensors
    }
    return {**state_dict, "state": state}


def _as_if_sharded(parameter: str, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    if set(tensors) != {"sum", "step"}:
        return tensors
    table = parameter.split(".")[-2]
    accumulators: torch.Tensor = tensors["sum"]
    # Never one column of a table: dimensions are multiples of 4.
    is_row_wise = accumulators.shape[1] == 1
    return {f"{table}.momentum1": accumulators[:, 0] if is_row_wise else accumulators}
