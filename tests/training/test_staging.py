"""Copies of a state in host memory: complete, of the moment, in the same buffers every time."""

from typing import Any

import pytest
import torch
from multirank import run_ranks
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from toy_model import Job

from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.training.staging import HostCopies


def test_nested_values_are_copied_and_plain_ones_kept():
    weights = torch.nn.Parameter(torch.ones(2, 3))
    state = {
        "a": {"b": weights, "lr": 0.5},
        "list": [torch.zeros(1), "name"],
        "tuple": (torch.zeros(2), None),
    }
    copy = HostCopies().take(state)
    with torch.no_grad():
        weights.zero_()
        state["list"][0] += 1
        state["tuple"][0].add_(1)
    assert copy["a"]["b"].equal(torch.ones(2, 3))
    assert not copy["a"]["b"].requires_grad
    assert copy["a"]["lr"] == 0.5
    assert copy["list"][0].equal(torch.zeros(1))
    assert copy["list"][1] == "name"
    assert copy["tuple"][0].equal(torch.zeros(2))
    assert copy["tuple"][1] is None


def test_buffers_are_made_once_and_anew_where_a_tensor_changed():
    copies, weights, bias = HostCopies(), torch.ones(4), torch.ones(2)
    first = copies.take({"weights": weights, "bias": bias})
    second = copies.take({"weights": weights + 1, "bias": torch.ones(3)})
    assert first["weights"].data_ptr() == second["weights"].data_ptr()
    assert second["weights"].equal(torch.full((4,), 2.0))
    assert second["bias"].shape == (3,)
    third = copies.take({"weights": weights.double(), "bias": bias})
    assert third["weights"].dtype == torch.float64


def test_views_are_copied_to_what_they_show():
    whole = torch.arange(12.0).view(3, 4)
    copy = HostCopies().take({"column": whole[:, 1], "transposed": whole.t()})
    assert copy["column"].tolist() == [1.0, 5.0, 9.0]
    assert copy["transposed"].equal(whole.t())


def copy_of_shards(sharding: str) -> dict[str, Any]:
    """What a copy of the toy's tables on this rank is like, while training goes on."""
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        job = Job(runtime, sharding)
        state = job.model.state_dict()
        before = {
            key: [(shard.metadata, shard.tensor.clone()) for shard in value.local_shards()]
            for key, value in state.items()
            if isinstance(value, ShardedTensor)
        }
        copy = HostCopies().take(state)
        job.train(1)
        return {
            key: {
                "is sharded": isinstance(copy[key], ShardedTensor),
                "size": copy[key].size() == state[key].size(),
                "offsets": [shard.metadata.shard_offsets for shard in copy[key].local_shards()]
                == [metadata.shard_offsets for metadata, _ in shards],
                "values": all(
                    shard.tensor.equal(values)
                    for shard, (_, values) in zip(copy[key].local_shards(), shards, strict=True)
                ),
                "places": [str(shard.placement) for shard in copy[key].metadata().shards_metadata],
            }
            for key, shards in before.items()
        }


@pytest.mark.parametrize("sharding", ["row_wise", "column_wise"])
def test_shards_keep_their_places_on_every_rank(sharding):
    ranks = run_ranks(2, copy_of_shards, sharding)
    for seen in ranks:
        assert len(seen) == 3
        for table in seen.values():
            assert all(table[what] for what in ("is sharded", "size", "offsets", "values"))
            assert set(table["places"]) <= {"rank:0/cpu", "rank:1/cpu"}
    assert {place for table in ranks[0].values() for place in table["places"]} == {"rank:0/cpu", "rank:1/cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_from_a_device_are_pinned_and_complete():
    weights = torch.arange(1_000_000, device="cuda", dtype=torch.float32)
    copy = HostCopies().take({"weights": weights})
    weights.zero_()
    assert copy["weights"].is_pinned()
    assert copy["weights"].equal(torch.arange(1_000_000, dtype=torch.float32))
