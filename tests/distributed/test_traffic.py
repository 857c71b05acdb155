"""Predicted bytes between ranks: against those that TorchRec hands to gloo in a real step, and by hand."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from multirank import run_ranks
from toy_model import DIM, GLOBAL_ROWS, KEYS, STAGE, Toy, rows_of

from hetegen_rec.config.plan import World
from hetegen_rec.config.run import DistributedConfig, TableConfig
from hetegen_rec.distributed.counting import CountedCalls
from hetegen_rec.distributed.optimizers import attach_table_optimizer
from hetegen_rec.distributed.planning import agree_on_plan
from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.distributed.sharding import init_tables, shard_model
from hetegen_rec.distributed.traffic import (
    Block,
    TableLoad,
    all_reduce_by_rank,
    blocks_of,
    busiest,
    exchange,
    sent_by_rank,
)

TABLES = {"user": 64, "item": 128}
PAIR = World(num_hosts=1, local_size=2)
FOUR = World(num_hosts=2, local_size=2)


def _compare(sharding: Any, forward: Any, backward: Any, tables: dict[str, int] = TABLES) -> Any:
    """What one rank sends in a step, as predicted and as counted."""
    loads = [TableLoad(name, rows, DIM, len(KEYS[name]), len(KEYS[name])) for name, rows in tables.items()]
    config = DistributedConfig(
        tables={"default": TableConfig(sharding=(sharding,))},
        forward_precision=forward,
        backward_precision=backward,
    )
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        toy = Toy(tables)
        attach_table_optimizer(toy.ebc, "rowwise_adagrad", STAGE, "cpu")
        plan = agree_on_plan(runtime, toy, config, GLOBAL_ROWS // 2)
        model = shard_model(toy, plan, runtime, config)
        init_tables(model, seed=1, std=0.5)
        rows, _ = rows_of_tables(runtime.rank, tables)
        calls = CountedCalls(2)
        with calls.counted():
            model(rows).sum().backward()
        sent = exchange(blocks_of(plan, loads), PAIR, GLOBAL_ROWS // 2, forward, backward)
        predicted = [matrix[runtime.rank].tolist() for matrix in (sent.ids, sent.forward, sent.backward)]
        return predicted, [calls.ids.tolist(), *calls.vectors]


def _compare_on_two_hosts() -> Any:
    """What one of four ranks sends of a table whose rows are cut over a host, to others."""
    rank = int(os.environ["RANK"])
    os.environ.update(LOCAL_WORLD_SIZE="2", LOCAL_RANK=str(rank % 2))
    config = DistributedConfig(tables={"default": TableConfig(sharding=("table_row_wise",))})
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        toy = Toy({"item": 128})
        attach_table_optimizer(toy.ebc, "rowwise_adagrad", STAGE, "cpu")
        plan = agree_on_plan(runtime, toy, config, 3)
        model = shard_model(toy, plan, runtime, config)
        init_tables(model, seed=1, std=0.5)
        rows, _ = rows_of_tables(rank, {"item": 128}, 4)
        calls = CountedCalls(4)
        with calls.counted():
            model(rows).sum().backward()
        sent = exchange(blocks_of(plan, [TableLoad("item", 128, DIM, 2, 2)]), FOUR, 3)
        within, across, back_across, back_within = np.array(calls.vectors)
        counted = np.array([within + across, back_across + back_within])
        predicted = np.array([sent.forward[rank], sent.backward[rank]])
        counted[:, rank] = predicted[:, rank] = 0.0
        return predicted.tolist(), counted.tolist(), float(sent.ids[rank].sum()), float(calls.ids.sum())


def rows_of_tables(rank: int, tables: dict[str, int], ranks: int = 2) -> tuple[Any, torch.Tensor]:
    """One rank's rows, of the keys of these tables alone."""
    kjt, labels = rows_of(rank, ranks)
    keys = [key for name in tables for key in KEYS[name]]
    return kjt.permute([kjt.keys().index(key) for key in keys]), labels


@pytest.mark.parametrize(
    ("sharding", "forward", "backward"),
    [("table_wise", "fp32", "fp32"), ("table_wise", "fp16", "fp32"), ("column_wise", "fp32", "fp16")],
)
def test_whole_tables_and_columns_send_what_is_predicted(sharding: str, forward: str, backward: str) -> None:
    for predicted, counted in run_ranks(2, _compare, sharding, forward, backward):
        assert predicted == counted


def test_int8_sends_what_is_predicted() -> None:
    # FBGEMM takes multiples of 32 numbers to each rank: of 6 rows, two keys and 8 columns.
    for predicted, counted in run_ranks(2, _compare, "table_wise", "int8", "fp32", {"item": 128}):
        assert predicted == counted


@pytest.mark.parametrize("precisions", [("fp32", "fp32"), ("fp16", "fp16")])
def test_tables_cut_into_rows_send_what_is_predicted(precisions: Any) -> None:
    for predicted, counted in run_ranks(2, _compare, "row_wise", *precisions):
        assert predicted[1:] == counted[1:]
        # These few ids are all in the first half of their tables; the prediction spreads them evenly.
        assert sum(predicted[0]) == sum(counted[0])


def test_rows_cut_over_a_host_send_what_is_predicted() -> None:
    of_ranks = run_ranks(4, _compare_on_two_hosts)
    assert any(sum(forward) > 0 for (forward, _), *_ in of_ranks)
    for predicted, counted, predicted_ids, counted_ids in of_ranks:
        assert predicted == counted
        assert predicted_ids == counted_ids


def _block(sharding: str, ranks: tuple[int, ...], keys: int = 1) -> Block:
    load = TableLoad("item", 100, 8, keys, keys)
    return Block(load, sharding, "fused", 8, ranks, tuple(1 / len(ranks) for _ in ranks))


def test_a_whole_table_sends_its_rows_to_everybody() -> None:
    sent = exchange([_block("table_wise", (1,))], FOUR, rows=10)
    numbers = 10 * 8 * 4
    assert sent_by_rank(sent.forward, FOUR)[0].tolist() == [0, numbers, 0, 0]
    assert sent_by_rank(sent.forward, FOUR)[1].tolist() == [0, 2 * numbers, 0, 0]
    assert busiest(sent.backward, FOUR) == (numbers, 2 * numbers)  # rank 1 receives what it had sent
    assert sent.ids[:, 1].tolist() == [10 * (4 + 8)] * 4


def test_rows_within_a_host_cross_hosts_once() -> None:
    flat = exchange([_block("row_wise", (0, 1, 2, 3))], FOUR, rows=10)
    nested = exchange([_block("table_row_wise", (0, 1))], FOUR, rows=10)
    numbers = 10 * 8 * 4
    assert busiest(flat.forward, FOUR) == (numbers, 2 * numbers)
    assert busiest(nested.forward, FOUR) == (2 * numbers, numbers)


def test_int8_is_counted_with_its_scales() -> None:
    block = _block("table_wise", (0,))
    exact = exchange([block], PAIR, rows=16)
    coarse = exchange([block], PAIR, rows=16, forward="int8", backward="bf16")
    assert coarse.forward[0, 1] == exact.forward[0, 1] * 40 / 128
    assert coarse.backward[1, 0] == exact.backward[1, 0] / 2


def test_a_ring_sends_every_gradient_twice_but_for_its_own_share() -> None:
    assert all_reduce_by_rank(80.0, World(1, 4)) == (2 * 3 / 4 * 80, 0.0)
    assert sum(all_reduce_by_rank(80.0, FOUR)) == 2 * 3 / 4 * 80
    assert all_reduce_by_rank(80.0, World(1, 1)) == (0.0, 0.0)
