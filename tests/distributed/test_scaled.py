import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ShardingPlan
from toy_model import Toy

from hetegen_rec.config.run import DistributedConfig, ShardingKind, StageConfig, TableConfig
from hetegen_rec.distributed.optimizers import attach_table_optimizer
from hetegen_rec.distributed.planning import Cluster, make_plan
from hetegen_rec.distributed.scaled import carry_over, row_blocks, scaled_rows
from hetegen_rec.distributed.sharding import TableSharder

ROWS = 100_000
SCALED = 1001
GB = 10**9


def plan_of(kind: ShardingKind, kernel: str | None = None) -> ShardingPlan:
    """A plan for one table on two hosts of four devices."""
    toy = Toy({"item": ROWS})
    attach_table_optimizer(toy.ebc, "rowwise_adagrad", StageConfig(), "cuda")
    config = DistributedConfig(tables={"item": TableConfig(sharding=(kind,), kernel=kernel)})  # type: ignore[arg-type]
    return make_plan(toy, config, Cluster("cuda", 8, 4, 64 * GB, 8 * GB), 64)


def shards_of(plan: ShardingPlan) -> list[tuple[int, list[int], list[int]]]:
    """Rank, offsets and sizes of each shard of the table, by row and column."""
    placed = plan.plan["ebc"]["item"]
    shards = [(s.placement.rank(), s.shard_offsets, s.shard_sizes) for s in placed.sharding_spec.shards]
    return sorted(shards, key=lambda shard: shard[1])


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [
        ("table_wise", 1),
        ("column_wise", 1),
        ("table_column_wise", 1),
        ("row_wise", 8),
        ("table_row_wise", 4),
        ("grid_shard", 4),
    ],
)
def test_a_smaller_table_is_cut_and_placed_as_planned(kind: ShardingKind, blocks: int) -> None:
    planned = plan_of(kind)
    assert row_blocks(planned) == {"item": blocks}
    here, carried = carry_over(planned, {"item": SCALED}, TableSharder())
    assert (carried["item"].sharding, carried["item"].kernel, carried["item"].not_run) == (
        kind,
        "fused",
        None,
    )
    before, after = shards_of(planned), shards_of(here)
    assert [(rank, offsets[1], sizes[1]) for rank, offsets, sizes in after] == [
        (rank, offsets[1], sizes[1]) for rank, offsets, sizes in before
    ]
    assert sum(sizes[0] * sizes[1] for _, _, sizes in after) == SCALED * 8  # all of it, and once
    assert {shard.placement.device().type for shard in here.plan["ebc"]["item"].sharding_spec.shards} == {
        "cpu"
    }


def test_a_copy_stays_a_copy() -> None:
    planned = plan_of("data_parallel")
    here, carried = carry_over(planned, {"item": SCALED}, TableSharder())
    assert row_blocks(planned) == {"item": 1}
    assert here.plan["ebc"]["item"].sharding_spec is None
    assert carried["item"].kernel == "dense"


def test_a_kernel_of_devices_alone_is_told_of() -> None:
    here, carried = carry_over(plan_of("row_wise", "fused_uvm"), {"item": SCALED}, TableSharder())
    assert here.plan["ebc"]["item"].compute_kernel == carried["item"].kernel == "fused"
    assert carried["item"].not_run == "kernel fused_uvm does not exist on CPUs; run as fused"


def test_a_kind_that_cpus_lack_is_run_whole_and_told_of() -> None:
    planned = plan_of("grid_shard")
    here, carried = carry_over(planned, {"item": SCALED}, EmbeddingBagCollectionSharder())  # TorchRec's own
    ((rank, offsets, sizes),) = shards_of(here)
    assert (offsets, sizes) == ([0, 0], [SCALED, 8])
    assert rank in planned.plan["ebc"]["item"].ranks
    assert here.plan["ebc"]["item"].sharding_type == carried["item"].sharding == "table_wise"
    assert carried["item"].not_run == "grid_shard does not exist on CPUs; run whole on one rank"


@given(st.integers(2, 10**9), st.integers(1, 10**6), st.integers(1, 2000), st.integers(1, 64))
def test_every_block_of_rows_keeps_one(rows: int, factor: int, least: int, blocks: int) -> None:
    found = scaled_rows(rows, factor, least, blocks)
    assert min(rows, least) <= found <= rows
    if found < rows:
        assert found % blocks == 0


def test_rows_are_divided() -> None:
    assert scaled_rows(200_000_002, 1000, 1027, 1) == 200_001
    assert scaled_rows(200_000_002, 1000, 1027, 16) == 200_016
    assert scaled_rows(66, 1000, 1027, 1) == 66
