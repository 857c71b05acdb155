"""Gradients of the fields' losses, measured for the log: what, when, and that this changes nothing."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from multirank import run_ranks
from small_log import SCHEMA, Log, balance_of, make_model, model_config

from hetegen_rec.config.schema import Schema
from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.models.balancing import FORMS
from hetegen_rec.models.difficulty import Probe
from hetegen_rec.training.meter import Meter

SHARES = [(0, 40, 0), (40, 64, 16)]
"""First and last row of each rank, and its padding."""


@cache
def log():
    return Log(64)


def probing(stage="pretrain", every=1, **settings):
    """A model that measures its gradients, of the same weights whatever the settings."""
    return make_model(log(), stage, model_config(**settings), probe_every=every)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_can_be_measured_and_trains_as_if_it_were_not(form):
    balance = balance_of(form, every=10_000)
    measured, plain = probing(balance=balance), probing(every=None, balance=balance)
    plain.load_state_dict(measured.state_dict())
    losses = {}
    for name, model in (("measured", measured), ("plain", plain)):
        loss, outputs = model(log().batch())
        loss.backward()
        losses[name] = outputs.fields
    assert losses["plain"].probe is None
    assert losses["measured"].probe.shares.sum() == pytest.approx(1.0)
    for (name, one), (_, other) in zip(measured.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name, rtol=0, atol=0)
    states = measured.state_dict(), plain.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_shares_are_of_the_relative_losses_before_weighting():
    # Attention that knows the weights would have other gradients, too.
    unguided = {"num_layers": 1, "attention": {"guidance": "none"}}
    uniform, hard = (probing(balance={"form": f}, denoiser=unguided) for f in ("uniform", "difficulty"))
    hard.load_state_dict(uniform.state_dict())
    with torch.no_grad():
        hard.network.difficulty.difficulty.copy_(torch.linspace(-3.0, 0.0, len(hard.network.fields))[:, None])
    probes = [model(log().batch())[1].fields.probe for model in (uniform, hard)]
    assert hard.network.difficulty.weights().std() > 0.5
    torch.testing.assert_close(probes[0].shares, probes[1].shares)


def test_about_one_step_in_so_many_is_measured():
    model = probing(every=4)
    measured = [model(log().batch(step=step))[1].fields.probe is not None for step in range(80)]
    assert 8 <= sum(measured) <= 32


@pytest.mark.parametrize("stage", ["finetune", "scratch"])
def test_stages_without_reconstruction_have_nothing_to_measure(stage):
    assert probing(stage)(log().batch())[1].fields is None


def probe_of(batch):
    """Under heads that take nothing from the other rows of a rank."""
    described = SCHEMA.model_dump(mode="json")
    for field in described["fields"]:
        field["reconstruct"] = field["kind"] != "sequence"
    config = model_config(reconstruction={"full_softmax_max": 1000})
    model = make_model(log(), "pretrain", config, Schema.model_validate(described), probe_every=1)
    probe = model(batch)[1].fields.probe
    return probe.norms, probe.alignment


def probe_of_share():
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        torch.set_num_threads(1)
        start, stop, padding = SHARES[runtime.rank]
        return probe_of(log().batch(start, stop, padding=padding))


def test_all_ranks_measure_the_gradients_of_the_global_batch():
    expected = probe_of(log().batch())
    for found in run_ranks(len(SHARES), probe_of_share):
        for values, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-6)


def test_a_line_of_the_log_has_the_mean_over_the_probes_since_the_one_before():
    model, meter = probing(), Meter()
    _, outputs = model(log().batch())
    num_fields = len(model.network.fields)
    even, first = torch.ones(num_fields), torch.eye(num_fields)[0]
    for probe in (None, Probe(3.0 * even, even), Probe(7.0 * first, -even)):
        meter.add(replace(outputs, fields=replace(outputs.fields, probe=probe)), rows=64)
    lines = meter.read(model.network.difficulty, model.network.fields)["fields"]
    shares = [line["gradient_share"] for line in lines.values()]
    assert shares[0] == pytest.approx((1 / num_fields + 1) / 2)
    assert shares[1:] == pytest.approx([1 / num_fields / 2] * (num_fields - 1))
    assert {line["label_cosine"] for line in lines.values()} == {0.0}
    meter.reset()
    meter.add(replace(outputs, fields=replace(outputs.fields, probe=None)), rows=64)
    lines = meter.read(model.network.difficulty, model.network.fields)["fields"]
    assert all("gradient_share" not in line and "label_cosine" not in line for line in lines.values())
