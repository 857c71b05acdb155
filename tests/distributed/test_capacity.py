from dataclasses import replace

import pytest
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, construct_split_state

from hetegen_rec.config.hardware import Assumptions, HardwareProfile
from hetegen_rec.config.plan import World
from hetegen_rec.config.run import DistributedConfig, TableOptimizer
from hetegen_rec.distributed.capacity import (
    Setting,
    cluster_of,
    fits,
    hot_spot,
    largest_rows,
    memory_by_rank,
    step_time,
    traffic_by_collective,
)
from hetegen_rec.distributed.traffic import Block, TableLoad
from hetegen_rec.models.footprint import Footprint, Growth

GB = 10**9
PROFILE = HardwareProfile(
    device="cuda",
    device_memory_gb=10.0,
    device_bandwidth_gbs=1000.0,
    fp32_tflops=10.0,
    bf16_tflops=100.0,
    intra_host_gbs=100.0,
    inter_host_gbs=10.0,
    host_device_gbs=20.0,
    host_memory_gb=100.0,
    host_bandwidth_gbs=200.0,
    devices_per_host=2,
    assumptions=Assumptions(compute=1.0, memory=1.0, links=1.0, activations=1.0, reserve_gb=0.0),
)
ITEM, USER = TableLoad("item", 1_000_000, 16, 5, 5), TableLoad("user", 2_000_000, 8, 1, 1)


def whole(load: TableLoad, rank: int, kernel: str = "fused") -> Block:
    return Block(load, "table_wise", kernel, load.dim, (rank,), (1.0,))


def setting(*blocks: Block, optimizer: TableOptimizer = "rowwise_adagrad") -> Setting:
    linear = Growth(0.0, 1000.0, 0.0, 1)
    return Setting(
        world=World(2, 2),
        profile=PROFILE,
        cap=10 * GB,
        host_cap=50 * GB,
        blocks=blocks or (whole(ITEM, 0), whole(USER, 3)),
        copies=(),
        loads=(ITEM, USER),
        footprint=Footprint(100, 50, flops=linear, saved_bytes=linear),
        table_optimizer=optimizer,
        batch_row_bytes=64.0,
    )


@pytest.mark.parametrize(
    ("optimizer", "numbers"),
    [("sgd", 0), ("rowwise_adagrad", 1), ("adagrad", 16), ("adam", 32), ("partial_rowwise_adam", 17)],
)
def test_a_table_takes_its_weights_and_its_optimizer_state(optimizer: TableOptimizer, numbers: int) -> None:
    first, second, *_ = memory_by_rank(setting(optimizer=optimizer), 10)
    assert first.tables == 1_000_000 * 16 * 4
    assert first.table_optimizer == 1_000_000 * numbers * 4
    assert (second.tables, second.table_optimizer) == (0.0, 0.0)


def test_the_network_takes_its_weights_gradients_and_moments_on_every_rank() -> None:
    found = memory_by_rank(setting(), 10)
    assert {one.dense for one in found} == {(100 + 4 * 50) * 4}
    assert {one.activations for one in found} == {10_000.0}


def test_rows_are_looked_up_for_all_ranks_and_kept_with_their_gradients() -> None:
    first, second, *_ = memory_by_rank(setting(), 10)
    received = 10 * (5 * 16 + 8) * 4
    assert second.exchange == 2 * received
    assert first.exchange == 2 * (received + 4 * 10 * 5 * 16 * 4)


def test_tables_in_the_memory_of_the_host_are_not_on_the_device() -> None:
    hosted = setting(whole(ITEM, 0, "fused_uvm"), whole(USER, 3))
    first = memory_by_rank(hosted, 10)[0]
    assert (first.tables, first.host_tables) == (0.0, 1_000_000 * 16 * 4)
    assert "host_tables" not in traffic_by_collective(setting(), 10)
    assert traffic_by_collective(hosted, 10)["host_tables"].host_device > 3 * 40 * 5 * 16 * 4
    time = step_time(hosted, 10)
    assert time.overlapped > time.host_tables > 0  # a lookup waits for its rows


@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
@pytest.mark.parametrize(
    ("optimizer", "are_rowwise"),
    [("rowwise_adagrad", [True]), ("adagrad", [False]), ("partial_rowwise_adam", [False, True])],
)
def test_states_of_tables_on_the_host_stand_where_fbgemm_puts_them(
    kernel: str, optimizer: TableOptimizer, are_rowwise: list[bool]
) -> None:
    location = EmbeddingLocation.MANAGED if kernel == "fused_uvm" else EmbeddingLocation.MANAGED_CACHING
    specs = [(ITEM.rows, ITEM.dim, location, ComputeDevice.CUDA)]
    states = [construct_split_state(specs, rowwise=rowwise, cacheable=False) for rowwise in are_rowwise]
    found = memory_by_rank(setting(whole(ITEM, 0, kernel), optimizer=optimizer), 10)[0]
    assert found.table_optimizer == 4 * sum(state.dev_size for state in states)
    assert found.host_tables == 4 * (ITEM.rows * ITEM.dim + sum(state.uvm_size for state in states))


def test_the_copy_for_checkpoints_is_in_the_memory_of_the_host() -> None:
    network = (100 + 2 * 50) * 4
    of_item = 4 * ITEM.rows * (ITEM.dim + 1)
    for kernel in ("fused", "fused_uvm", "fused_uvm_caching"):
        first, second, *_ = memory_by_rank(setting(whole(ITEM, 0, kernel)), 10)
        assert first.host_checkpoint == of_item + network
        assert second.host_checkpoint == network
        assert first.checkpoint == second.checkpoint == 0.0
        assert first.on_host == first.host_tables + first.host_checkpoint
    on_cpu = replace(setting(whole(ITEM, 0)), profile=PROFILE.model_copy(update={"device": "cpu"}))
    first = memory_by_rank(on_cpu, 10)[0]
    assert (first.checkpoint, first.on_host) == (of_item + network, 0.0)
    assert first.total > first.tables + first.checkpoint


def test_a_host_without_room_for_the_copy_does_not_fit() -> None:
    whole_host = setting()
    memory = memory_by_rank(whole_host, 10)
    needed = max(one.on_host for one in memory)
    assert fits(replace(whole_host, host_cap=needed), memory)
    assert not fits(replace(whole_host, host_cap=needed - 1), memory)


def test_copies_stand_everywhere_and_their_gradients_are_reduced() -> None:
    copied = replace(setting(whole(ITEM, 0)), copies=(USER,))
    tables = [one.tables for one in memory_by_rank(copied, 10)]
    assert tables[1] == 2_000_000 * 8 * 4
    assert traffic_by_collective(copied, 10)["dense"].total > 2_000_000 * 8 * 4


def test_a_plan_fits_if_every_rank_does() -> None:
    assert fits(setting(), memory_by_rank(setting(), 10))
    tight = replace(setting(), cap=0.07 * GB)
    assert not fits(tight, memory_by_rank(tight, 10_000))


def test_the_slower_link_decides_how_long_an_exchange_takes() -> None:
    rows = 1000
    sent = rows * 5 * 16 * 4  # to one other rank of the host, and to two on the other host
    assert step_time(setting(), rows).forward == pytest.approx(2 * sent / (10 * GB))


def test_half_precision_halves_the_exchange_and_nothing_else() -> None:
    exact = step_time(setting(), 1000)
    halved = step_time(replace(setting(), forward="bf16"), 1000)
    assert halved.forward == exact.forward / 2
    assert halved.backward == exact.backward


def test_the_network_is_bound_by_products_or_by_memory() -> None:
    base = setting()
    heavy = replace(base, footprint=replace(base.footprint, flops=Growth(0.0, 1e9, 0.0, 1)))
    assert step_time(heavy, 100).compute == pytest.approx(1e11 / 1e13)
    assert step_time(replace(heavy, precision="bf16"), 100).compute == pytest.approx(1e11 / 1e14)
    assert step_time(base, 100).compute == pytest.approx(5 * 1e5 / (1000 * GB))


def test_overlap_never_costs_more_than_one_thing_after_the_other() -> None:
    time = step_time(setting(), 1000)
    assert 0 < time.overlapped < time.serial


def test_one_rank_exchanges_nothing() -> None:
    alone = replace(setting(whole(ITEM, 0), whole(USER, 0)), world=World(1, 1))
    time = step_time(alone, 100)
    assert (time.ids, time.forward, time.backward, time.dense) == (0.0, 0.0, 0.0, 0.0)
    assert time.lookup > 0


def test_the_rank_that_sends_most_is_named_with_its_table() -> None:
    spot = hot_spot(setting())
    assert spot is not None
    assert (spot.rank, spot.table) == (0, "item")
    assert spot.times_mean == pytest.approx(4 * 80 / 88)


def test_the_largest_batch_is_the_last_power_of_two_that_is_possible() -> None:
    assert largest_rows(lambda rows: rows <= 100) == 64
    assert largest_rows(lambda rows: rows < 1) == 0
    assert largest_rows(lambda rows: True, limit=256) == 256


def test_configured_memory_goes_before_the_profile() -> None:
    found = cluster_of(PROFILE, World(2, 2), DistributedConfig())
    assert (found.device_bytes, found.host_bytes) == (10 * GB, 80 * GB)
    config = DistributedConfig(device_memory_gb=4.0, host_memory_gb=8.0)
    found = cluster_of(PROFILE, World(2, 2), config)
    assert (found.device_bytes, found.host_bytes_per_rank) == (4 * GB, 4 * GB)
