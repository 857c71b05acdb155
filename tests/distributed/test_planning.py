import json
from typing import Any, Literal

import pytest
import torch
from multirank import run_ranks
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType
from toy_model import Toy

from hetegen_rec.config.run import DistributedConfig, ShardingKind, StageConfig, TableConfig
from hetegen_rec.distributed.optimizers import attach_table_optimizer
from hetegen_rec.distributed.planning import (
    Cluster,
    PlanningError,
    agree_on_plan,
    describe_cluster,
    make_plan,
    plan_as_json,
    plan_summary,
)
from hetegen_rec.distributed.runtime import start_runtime

GB = 10**9


def _toy(tables: dict[str, int], device: str = "cpu") -> Toy:
    toy = Toy(tables)
    attach_table_optimizer(toy.ebc, "rowwise_adagrad", StageConfig(), device)
    return toy


def _config(**tables: TableConfig) -> DistributedConfig:
    return DistributedConfig(tables=tables)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_tables_are_never_replicated_unasked(world_size: int) -> None:
    toy = _toy({"user": 100, "item": 50_000, "tiny": 2})
    plan = make_plan(toy, _config(), Cluster("cpu", world_size, world_size, 64 * GB), 256)
    lines = plan_summary(plan, toy)
    assert [line.table for line in lines] == ["item", "user", "tiny"]
    assert all(line.sharding != "data_parallel" for line in lines)


def test_equal_tables_of_cpu_ranks_stay_whole() -> None:
    toy = _toy({"user": 40_000, "item": 40_000})
    plan = make_plan(toy, _config(), describe_cluster(_config(), "cpu", 2, 2), 2048)
    lines = plan_summary(plan, toy)
    assert {line.sharding for line in lines} == {"table_wise"}
    assert sorted(line.ranks for line in lines) == [(0,), (1,)]


def test_constraints_by_table_and_by_default() -> None:
    toy = _toy({"user": 100, "item": 50_000, "tiny": 2})
    config = _config(
        item=TableConfig(sharding=("row_wise",)), default=TableConfig(sharding=("data_parallel",))
    )
    plan = make_plan(toy, config, Cluster("cpu", 2, 2, 64 * GB), 256)
    kinds = {line.table: (line.sharding, line.ranks) for line in plan_summary(plan, toy)}
    assert kinds == {
        "item": ("row_wise", (0, 1)),
        "user": ("data_parallel", (0, 1)),
        "tiny": ("data_parallel", (0, 1)),
    }


def _place(rows: int, world_size: int, config: DistributedConfig) -> tuple[str, int]:
    toy = _toy({"item": rows})
    (line,) = plan_summary(make_plan(toy, config, Cluster("cpu", world_size, world_size, 64 * GB), 256), toy)
    return line.sharding, len(line.ranks)


def test_small_tables_stay_whole_where_rows_are_cut_by_default() -> None:
    config = _config(default=TableConfig(sharding=("row_wise",)))
    assert _place(3, 3, config) == ("row_wise", 3)
    assert _place(2, 3, config) == ("table_wise", 1)
    assert _place(11, 8, config) == ("table_wise", 1)  # blocks of 2 would leave the last ranks empty
    assert _place(16, 8, config) == ("row_wise", 8)


def test_a_small_table_cut_into_rows_by_name_is_refused() -> None:
    config = _config(item=TableConfig(sharding=("row_wise",)))
    with pytest.raises(PlanningError, match=r"distributed\.tables\.item\.sharding: row_wise cuts the 2 rows"):
        _place(2, 3, config)


def _pooled(key: str, *kinds: ShardingKind) -> str:
    """Where a table that averages lists goes."""
    ebc = EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(
                name="tags",
                num_embeddings=100,
                embedding_dim=8,
                feature_names=["tags"],
                pooling=PoolingType.MEAN,
            )
        ],
    )
    attach_table_optimizer(ebc, "rowwise_adagrad", StageConfig(), "cpu")
    model = torch.nn.ModuleDict({"ebc": ebc})
    config = _config(**{key: TableConfig(sharding=kinds)})
    (line,) = plan_summary(make_plan(model, config, Cluster("cpu", 4, 2, 64 * GB), 256), model)
    return line.sharding


def test_lists_are_not_averaged_where_torchrec_adds_them_up() -> None:
    assert _pooled("tags", "grid_shard", "row_wise") == "row_wise"
    assert _pooled("default", "grid_shard") == "table_wise"
    with pytest.raises(PlanningError, match=r"distributed\.tables\.tags\.sharding: grid_shard would add up"):
        _pooled("tags", "grid_shard")


def test_column_wise_cuts_narrow_tables_too() -> None:
    toy = _toy({"item": 50})
    config = _config(item=TableConfig(sharding=("column_wise",)))
    (line,) = plan_summary(make_plan(toy, config, Cluster("cpu", 2, 2, 64 * GB), 256), toy)
    assert line.ranks == (0, 1)


def test_a_large_job_is_planned_without_a_gpu() -> None:
    toy = _toy({"user": 100, "item": 200_000_000, "tiny": 2}, "cuda")
    config = DistributedConfig(device_memory_gb=4.0, host_memory_gb=100.0)
    plan = make_plan(toy, config, describe_cluster(config, "cuda", 16, 8), 4096)
    item = plan_summary(plan, toy)[0]
    assert item.table == "item"
    assert len(item.ranks) > 1


def test_memory_is_shared_by_the_ranks_of_a_host() -> None:
    cluster = describe_cluster(DistributedConfig(host_memory_gb=8.0), "cpu", 8, 4)
    assert cluster.host_bytes_per_rank == 2 * GB
    assert 0 < describe_cluster(DistributedConfig(), "cpu", 1, 1).host_bytes < 2**50


def _fits(cluster: Cluster, kernel: Literal["fused", "fused_uvm"]) -> bool:
    """Whether a table of 1.28 GB, with 0.16 GB of optimizer state, has a plan."""
    toy = _toy({"item": 40_000_000}, cluster.device)
    try:
        make_plan(toy, _config(item=TableConfig(kernel=kernel)), cluster, 16)
    except PlanningError:
        return False
    return True


def test_tables_leave_room_for_the_copy_that_checkpoints_are_written_from() -> None:
    assert not _fits(Cluster("cpu", 1, 1, 2 * GB), "fused")
    assert _fits(Cluster("cpu", 1, 1, 4 * GB), "fused")
    assert not _fits(Cluster("cuda", 1, 1, 3 * GB, 2 * GB), "fused_uvm")
    assert _fits(Cluster("cuda", 1, 1, 5 * GB, 2 * GB), "fused_uvm")


def test_tables_that_do_not_fit_are_named_with_the_keys_to_change() -> None:
    toy = _toy({"user": 100, "item": 200_000_000})
    with pytest.raises(PlanningError) as caught:
        make_plan(toy, _config(), Cluster("cpu", 2, 2, GB), 256)
    message = str(caught.value)
    assert "item (200,000,000 x 8, 6.400 GB)" in message
    assert "2 ranks with 0.500 GB of host memory (0.250 GB for tables" in message
    assert "distributed.host_memory_gb" in message


@pytest.mark.parametrize("key", ["item", "default"])
def test_a_kernel_that_the_device_lacks_names_its_key(key: str) -> None:
    config = _config(**{key: TableConfig(kernel="fused_uvm")})
    with pytest.raises(PlanningError, match=f"distributed.tables.{key}.kernel: fused_uvm.*cpu.*fused"):
        make_plan(_toy({"item": 50}), config, Cluster("cpu", 1, 1, GB), 16)


def test_a_plan_is_kept_as_json() -> None:
    toy = _toy({"item": 50})
    lines = plan_summary(make_plan(toy, _config(), Cluster("cpu", 1, 1, GB), 16), toy)
    (kept,) = json.loads(json.dumps(plan_as_json(lines)))
    assert (kept["table"], kept["rows"], kept["dim"], kept["ranks"]) == ("item", 50, 8, [0])


def _fail_to_plan() -> Any:
    config = DistributedConfig(host_memory_gb=0.001)
    with start_runtime("cpu", timeout_seconds=20) as runtime:
        try:
            agree_on_plan(runtime, _toy({"item": 200_000_000}), config, 16)
        except PlanningError as error:
            return str(error)


def test_a_failure_to_plan_reaches_every_rank() -> None:
    first, second = run_ranks(2, _fail_to_plan)
    assert first == second
    assert "item (200,000,000" in first
