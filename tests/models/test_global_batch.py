"""The ranks' losses are shares of one loss over the global batch, however rows and padding are spread."""

from dataclasses import replace
from functools import cache
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from multirank import run_ranks
from small_log import SCHEMA, Log, balance_of, make_model, model_config

from hetegen_rec.config.run import Stage
from hetegen_rec.config.schema import Schema
from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.models.balancing import FORMS

STAGES = get_args(Stage)
OBJECTIVES = {"diffusion": {}, "next_item": {"name": "next_item", "masked": ["place"]}}
"""Those that borrow nothing from the other rows of a rank."""
CASES = [(stage, objective) for stage in STAGES for objective in OBJECTIVES]
SHARES = [(0, 40, 0), (40, 64, 16), (64, 64, 40)]
"""First and last row of each rank, and its padding: none, some, nothing else."""


@cache
def log():
    return Log(64)


def gradients(stage, objective, batch):
    """Loss and gradients of a batch, under heads that take nothing from the other rows of a rank."""
    described = SCHEMA.model_dump(mode="json")
    for field in described["fields"]:
        field["reconstruct"] = field["kind"] != "sequence"
    described["item"] = "item"
    config = model_config(reconstruction={"full_softmax_max": 1000}, objective=OBJECTIVES[objective])
    model = make_model(log(), stage, config, Schema.model_validate(described), table_l2=0.1)
    loss, _ = model(batch)
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": loss.detach(), **found}


def mean_gradients():
    """By case, the mean over the ranks of what each has of its share."""
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        torch.set_num_threads(1)
        start, stop, padding = SHARES[runtime.rank]
        results = {}
        for case in CASES:
            found = gradients(*case, log().batch(start, stop, padding=padding))
            for values in found.values():
                dist.all_reduce(values)
            results[case] = {name: values / runtime.world_size for name, values in found.items()}
        return results


def test_the_mean_over_the_ranks_is_the_gradient_of_the_global_batch():
    found = run_ranks(len(SHARES), mean_gradients)[0]
    for case in CASES:
        expected = gradients(*case, log().batch())
        assert set(found[case]) == set(expected)
        for name, values in expected.items():
            torch.testing.assert_close(
                found[case][name], values, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        *((stage, {"balance": balance_of(form)}) for stage in ("pretrain", "joint") for form in FORMS),
        *((stage, {"noise": {"kind": "marginal"}}) for stage in ("pretrain", "joint")),
        ("finetune", {}),  # which neither balances nor adds noise
        ("scratch", {}),
    ],
    ids=str,
)
def test_nothing_but_padding_trains_nothing(stage, settings):
    model = make_model(log(), stage, model_config(**settings), table_l2=0.1)
    loss, outputs = model(replace(log().batch(0, 0, padding=8), num_real_rows=32))
    loss.backward()
    assert all(term.isfinite() for term in outputs.terms.values())
    moved = [name for name, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()]
    assert moved == []
