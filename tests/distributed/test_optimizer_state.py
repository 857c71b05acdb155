from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from multirank import run_ranks
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from toy_model import Job

from hetegen_rec.distributed.optimizer_state import canonical_optimizer_state
from hetegen_rec.distributed.runtime import start_runtime

OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
READ_AS = {"data_parallel": ("table_wise", "row_wise"), "row_wise": ("data_parallel",)}
"""By the sharding that was saved."""


def _state(job: Job) -> dict[str, Any]:
    return {
        "model": job.model.state_dict(),
        "optimizer": canonical_optimizer_state(job.optimizer.state_dict()),
    }


def _write(directory: Path) -> dict[str, list[float]]:
    """Saves after 3 steps of each optimizer under each sharding; the scores of the step after."""
    after = {}
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        for kind, name in product(READ_AS, OPTIMIZERS):
            job = Job(runtime, kind, name)
            job.train(3)
            save(_state(job), checkpoint_id=directory / kind / name, process_group=runtime.host_group)
            job.train(1)
            after[f"{kind} {name}"] = job.scores()
    return after


def _read(directory: Path) -> dict[str, list[list[float]]]:
    """The scores one step after loading what was saved, under other shardings."""
    after: dict[str, list[list[float]]] = {}
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        for (saved, kinds), name in product(READ_AS.items(), OPTIMIZERS):
            for kind in kinds:
                job = Job(runtime, kind, name)
                job.train(1)  # away from the initial weights and an empty state
                state = _state(job)
                load(state, checkpoint_id=directory / saved / name, process_group=runtime.host_group)
                job.model.load_state_dict(state["model"])
                job.optimizer.load_state_dict(job.optimizer.state_dict())
                job.train(1)
                after.setdefault(f"{saved} {name}", []).append(job.scores())
    return after


def test_the_next_step_is_the_same_whether_tables_are_sharded_or_replicated(tmp_path: Path) -> None:
    written = run_ranks(2, _write, tmp_path)[0]
    for found in [_read(tmp_path), *run_ranks(3, _read, tmp_path)]:
        assert found.keys() == written.keys()
        for case, loaded in found.items():
            for scores in loaded:
                assert scores == pytest.approx(written[case], abs=1e-5), case


def test_state_of_other_kinds_stays_as_it_is() -> None:
    moments = {"exp_avg": torch.ones(4, 8), "step": torch.tensor(3.0)}
    sharded = {"item.momentum1": torch.ones(4)}
    state = {"ebc.embedding_bags.item.weight": sharded, "network.hidden.weight": moments}
    assert canonical_optimizer_state({"state": state}) == {"state": state}
