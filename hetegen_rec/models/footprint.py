"""What a step of the replicated network costs: parameters, FLOP and memory, read off a few small steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchrec import KeyedJaggedTensor, KeyedTensor

from hetegen_rec.config.schema import NUM_RESERVED_IDS, Schema
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.models.attention import attention_as_on
from hetegen_rec.models.embedding import table_shapes
from hetegen_rec.models.network import ClickNetwork

_PROBES = (4, 8, 16)  # rows of the small steps; three determine a quadratic


@dataclass(frozen=True)
class Growth:
    """A cost as a function of the rows B of a rank: constant + per_row B + per_pair B min(B, candidates).

    The last term is that of in-batch candidates; everything else in a network is linear in the rows.
    """

    constant: float
    per_row: float
    per_pair: float
    candidates: int

    def at(self, rows: int) -> float:
        """The cost of so many rows."""
        return self.constant + rows * (self.per_row + self.per_pair * min(rows, self.candidates))


@dataclass(frozen=True)
class Footprint:
    """What one rank's network needs, as a function of its rows where it depends on them."""

    parameters: int
    trained_parameters: int
    """Those that get a gradient, which ranks exchange, and two moments of AdamW."""
    flops: Growth
    """FLOP of matrix products, forward and backward."""
    saved_bytes: Growth
    """Bytes that the forward pass keeps for the backward pass."""


def measure_footprint(
    network: ClickNetwork, schema: Schema, statistics: Statistics, device: str = "cpu"
) -> Footprint:
    """Runs training steps of a few random rows on CPU and counts; nothing is timed.

    So whatever objective, stage, backbone and precision is configured, the network itself says what it
    costs. Attention is counted as two matrix products, and kept as it is kept on that device.

    Args:
        network: on CPU; its gradients are cleared.
        schema: its fields.
        statistics: sizes of the tables.
        device: that the steps stand for.
    """
    flops, saved = [], []
    with attention_as_on(device):
        for rows in _PROBES:
            flops.append(_count_flops(network, *_random_rows(schema, statistics, network.config.dim, rows)))
            saved.append(_count_saved(network, *_random_rows(schema, statistics, network.config.dim, rows)))
    network.zero_grad(set_to_none=True)
    candidates = network.config.reconstruction.num_candidates
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    return Footprint(
        parameters=sum(size for size, _ in sizes),
        trained_parameters=sum(size for size, is_trained in sizes if is_trained),
        flops=_fit(flops, candidates),
        saved_bytes=_fit(saved, candidates),
    )


def _count_flops(network: ClickNetwork, looked_up: KeyedTensor, batch: Batch) -> float:
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the counter does not know the fused kernel of CPUs
        loss, _ = network(looked_up, batch)
        loss.backward()
    return float(counter.get_total_flops())


def _count_saved(network: ClickNetwork, looked_up: KeyedTensor, batch: Batch) -> float:
    """Bytes of the distinct storages that autograd keeps, weights excluded."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(looked_up, batch)
    return float(sum(storage.nbytes() for storage in kept.values()))


def _fit(found: Sequence[float], candidates: int) -> Growth:
    """The quadratic through the probes. What candidates above the probes cost is seen in none of them."""
    rows = np.array(_PROBES, dtype=np.float64)
    pairs = rows * np.minimum(rows, candidates)
    if candidates <= min(_PROBES):  # the third column would be a multiple of the second
        slope, constant = np.polyfit(rows, np.array(found), 1)
        return Growth(max(float(constant), 0.0), float(slope), 0.0, candidates)
    columns = np.stack([np.ones(3), rows, pairs], axis=1)
    constant, per_row, per_pair = np.linalg.solve(columns, np.array(found)).tolist()
    return Growth(max(constant, 0.0), max(per_row, 0.0), max(per_pair, 0.0), candidates)


def _random_rows(schema: Schema, statistics: Statistics, dim: int, rows: int) -> tuple[KeyedTensor, Batch]:
    """Rows that have a value in every place, and random vectors in the place of their table rows."""
    generator = torch.Generator().manual_seed(0)
    tokens = schema.tokens
    limits = [statistics.table_rows(schema.field(token.field).table_name) for token in tokens]
    ids = torch.stack(
        [torch.randint(min(NUM_RESERVED_IDS, n - 1), n, (rows,), generator=generator) for n in limits]
    )  # [T, B]
    keys = [token.key for token in tokens]
    widths = {shape.name: shape.dim for shape in table_shapes(schema, statistics, dim)}
    of_tokens = [widths[schema.field(token.field).table_name] for token in tokens]
    values = torch.randn(rows, sum(of_tokens), generator=generator).requires_grad_()
    shape = (rows, len(tokens))
    settings: dict[str, Any] = {
        "kjt": KeyedJaggedTensor(keys, ids.flatten(), lengths=torch.ones(ids.numel(), dtype=torch.int32)),
        "ids": ids.T.contiguous(),
        "log_prior": torch.full(shape, -math.log(100.0)),
        "log_rate": torch.full(shape, -math.log(100.0)),
        "labels": torch.arange(rows).remainder(2).float(),
        "row_ids": torch.arange(rows),
        "strata": (torch.arange(rows) + 0.5) / rows,
    }
    batch = Batch(**settings, num_real_rows=rows, noise_seed=0, cursor=Cursor())
    return KeyedTensor(keys, of_tokens, values, key_dim=1), batch
