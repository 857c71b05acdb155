from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from multirank import run_ranks
from torch import nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from toy_model import DIM, TABLES, Job

from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.training.load_plan import (
    GrowingLoadPlanner,
    Growth,
    Shape,
    grown_parameters,
    optimizer_state_mismatch,
)

ITEM = "ebc.embedding_bags.item.weight"
GROWN = TABLES | {"item": 61}
ROWS = Growth(TABLES["item"], GROWN["item"])
READ_AS = {
    "table_wise": ("table_wise", "row_wise"),
    "row_wise": ("row_wise",),
    "data_parallel": ("data_parallel",),
}
"""By the sharding that was saved."""


def _state(job: Job) -> dict[str, Any]:
    return {"model": job.model.state_dict(), "optimizer": job.optimizer.state_dict()}


def _whole(job: Job, value: ShardedTensor | torch.Tensor | None) -> list[Any]:
    """All rows of a tensor; a rank without a shard may know nothing of it."""
    if isinstance(value, torch.Tensor) and not isinstance(value, ShardedTensor):
        mine = [(0, value.tolist())] if job.runtime.is_main else []
    else:
        shards = [] if value is None else value.local_shards()
        mine = [(shard.metadata.shard_offsets[0], shard.tensor.tolist()) for shard in shards]
    parts = sorted(part for rank in job.runtime.gather(mine) for part in rank)
    return [row for _, rows in parts for row in rows]


def _item(job: Job) -> tuple[list[Any], list[Any]]:
    """Weights and row-wise accumulators of the items."""
    state = job.optimizer.state_dict()["state"].get(ITEM, {})
    accumulator = state.get("sum", state.get("item.momentum1"))
    return _whole(job, job.model.state_dict()[ITEM]), _whole(job, accumulator)


def _write(directory: Path) -> dict[str, Any]:
    """By sharding: scores and rows as they were saved."""
    seen = {}
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        for kind in READ_AS:
            job = Job(runtime, kind)
            job.train(2)
            save(_state(job), checkpoint_id=directory / kind, process_group=runtime.host_group)
            seen[kind] = {"scores": job.scores(), "item": _item(job)}
    return seen


def _read(directory: Path) -> list[dict[str, Any]]:
    """Loads into models of more items; also rows from before loading."""
    seen = []
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        for written_as, kinds in READ_AS.items():
            for kind in kinds:
                job = Job(runtime, kind, tables=GROWN)
                fresh = _item(job)
                state = _state(job)
                planner = GrowingLoadPlanner(grown_parameters(state["model"], {}, TABLES))
                load(state, checkpoint_id=directory / written_as, planner=planner)
                job.model.load_state_dict(state["model"])
                job.optimizer.load_state_dict(state["optimizer"])
                seen.append({"from": written_as, "scores": job.scores(), "item": _item(job), "fresh": fresh})
    return seen


def test_stored_rows_are_read_and_new_rows_stay(tmp_path: Path) -> None:
    written = run_ranks(2, _write, tmp_path)[0]
    # On 3 ranks the last row-wise shard, rows 42 to 60, holds new rows only.
    for found in [_read(tmp_path), *run_ranks(3, _read, tmp_path)]:
        for loaded in found:
            saved = written[loaded["from"]]
            assert loaded["scores"] == pytest.approx(saved["scores"], abs=1e-6)
            for now, stored, fresh in zip(loaded["item"], saved["item"], loaded["fresh"], strict=True):
                assert now == stored + fresh[ROWS.before :]
            weights, accumulators = (torch.tensor(rows) for rows in loaded["item"])
            assert weights.shape == (ROWS.after, DIM)
            assert accumulators[: ROWS.before].any()
            assert not accumulators[ROWS.before :].any()


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with start_runtime("cpu") as runtime:
        yield runtime


def _head(rows: int, columns: int = 3) -> tuple[nn.Linear, dict[str, Any]]:
    """A head and what a checkpoint holds of it, after a step of AdamW."""
    head = nn.Linear(columns, rows)
    optimizer = torch.optim.AdamW(head.parameters())
    head(torch.ones(1, columns)).sum().backward()
    optimizer.step()
    moments = {f"classes.{name}": optimizer.state[value] for name, value in head.named_parameters()}
    return head, {
        "model": {f"classes.{name}": value for name, value in head.state_dict().items()},
        "optimizer": {"state": moments},
    }


HEAD = {name: Growth(4, 6) for name in ("classes.weight", "classes.bias")}


@pytest.mark.usefixtures("runtime")
def test_a_head_grows_with_its_moments(tmp_path: Path) -> None:
    old, stored = _head(4)
    save(stored, checkpoint_id=tmp_path)
    new, state = _head(6)
    fresh = new.weight.detach().clone()
    state["optimizer"]["state"]["classes.weight"]["exp_avg"].fill_(7.0)
    load(state, checkpoint_id=tmp_path, planner=GrowingLoadPlanner(HEAD))
    assert torch.equal(new.weight, torch.cat([old.weight, fresh[4:]]))
    assert torch.equal(new.bias[:4], old.bias)
    moment = state["optimizer"]["state"]["classes.weight"]["exp_avg"]
    assert torch.equal(moment[:4], stored["optimizer"]["state"]["classes.weight"]["exp_avg"])
    assert (moment[4:] == 7.0).all()


@pytest.mark.parametrize(
    ("grown", "rows", "columns", "sizes"),
    [
        pytest.param({}, 6, 3, ("4, 3", "6, 3"), id="a parameter that may not grow"),
        pytest.param(HEAD, 5, 3, ("4, 3", "5, 3"), id="another number of new rows"),
        pytest.param(HEAD, 6, 2, ("4, 3", "6, 2"), id="other columns"),
        pytest.param(HEAD, 2, 3, ("4, 3", "2, 3"), id="fewer rows"),
    ],
)
@pytest.mark.usefixtures("runtime")
def test_any_other_change_of_shape_names_key_and_shapes(
    tmp_path: Path, grown: dict[str, Growth], rows: int, columns: int, sizes: tuple[str, str]
) -> None:
    save(_head(4)[1], checkpoint_id=tmp_path)
    with pytest.raises(CheckpointException) as error:
        load(
            _head(rows, columns)[1],
            checkpoint_id=tmp_path,
            planner=GrowingLoadPlanner(grown),
        )
    message = str(error.value)
    assert "model.classes.weight" in message
    for size in sizes:
        assert f"[{size}]" in message


@pytest.mark.usefixtures("runtime")
def test_a_key_that_is_not_stored_is_an_error(tmp_path: Path) -> None:
    save({"model": {}}, checkpoint_id=tmp_path)
    with pytest.raises(CheckpointException, match=r"model\.classes\.weight"):
        load(_head(6)[1], checkpoint_id=tmp_path, planner=GrowingLoadPlanner(HEAD))


def test_tables_and_heads_with_more_rows_than_stored_have_grown() -> None:
    shapes = {
        ITEM: (61, 8),
        "ebc.embedding_bags.tag.weight": (9, 8),
        "classes.item.bias": (59,),
        "out.bias": (2,),
    }
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    heads = {"classes.item.bias": "item", "classes.tag.bias": "tag"}
    assert grown_parameters(state, heads, {"item": 23, "tag": 9}) == {
        ITEM: ROWS,
        "classes.item.bias": Growth(21, 59),
    }


MOMENTUM = f"state.{ITEM}.item.momentum1"
MOMENT = "state.classes.weight.exp_avg"


@pytest.mark.parametrize(
    ("stored", "here"),
    [
        pytest.param({MOMENTUM: (23,)}, {MOMENTUM: (23,)}, id="nothing changed"),
        pytest.param({MOMENTUM: (23,)}, {MOMENTUM: (61,)}, id="row-wise state of a grown table"),
        pytest.param({MOMENTUM: (23, 8)}, {MOMENTUM: (61, 8)}, id="full state of a grown table"),
        pytest.param({MOMENT: (4, 3)}, {MOMENT: (6, 3)}, id="moments of a grown head"),
    ],
)
def test_a_state_that_fits_is_not_a_mismatch(stored: dict[str, Shape], here: dict[str, Shape]) -> None:
    assert optimizer_state_mismatch(stored, here, {ITEM: ROWS, **HEAD}) is None


@pytest.mark.parametrize(
    ("stored", "here", "words"),
    [
        pytest.param(
            {MOMENTUM: (46,)},
            {MOMENTUM: (23,)},
            ("table item", "46 there and 23 here", "distributed.tables.item.sharding"),
            id="no longer cut into columns",
        ),
        pytest.param({MOMENTUM: (46,)}, {MOMENTUM: (122,)}, ("table item", "nor grow"), id="cut and grown"),
        pytest.param({MOMENTUM: (23,)}, {MOMENTUM: (40,)}, ("23 there and 40 here",), id="other growth"),
        pytest.param(
            {MOMENTUM: (23,)},
            {},
            (MOMENTUM, "(23,) there, none here", "train.table_optimizer"),
            id="a table optimizer without state",
        ),
        pytest.param({MOMENTUM: (23,)}, {MOMENTUM: (23, 8)}, ("train.table_optimizer",), id="adagrad"),
        pytest.param({MOMENT: (4, 3)}, {MOMENT: (4, 5)}, (MOMENT, "model section"), id="another network"),
    ],
)
def test_what_cannot_be_taken_over_is_named(
    stored: dict[str, Shape], here: dict[str, Shape], words: tuple[str, ...]
) -> None:
    message = optimizer_state_mismatch(stored, here, {ITEM: ROWS})
    assert message is not None
    for word in words:
        assert word in message
