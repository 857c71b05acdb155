"""The assembly: what each stage's loss is made of and what it trains."""

from dataclasses import replace
from functools import cache
from typing import get_args

import pytest
import torch
from small_log import (
    FULL,
    SAMPLED,
    SCHEMA,
    TOKENS,
    Log,
    balance_of,
    column,
    make_model,
    model_config,
    tables_of,
)

from hetegen_rec.config.run import AttentionGuidance, Stage, StageConfig, TrainConfig
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.cursor import Cursor, Served
from hetegen_rec.models.balancing import FORMS
from hetegen_rec.models.corruption import LABEL_MASK_ID, Corrupted, Diffusion
from hetegen_rec.models.hetegen import _is_one_in, build_model
from hetegen_rec.models.reconstruction import RowLosses

STAGES = get_args(Stage)
GENERATIVE = {"generative", "calibration", "label"}


@cache
def log():
    return Log(64)


def without(*names):
    fields = [f for f in SCHEMA.model_dump(mode="json")["fields"] if f["name"] not in names]
    return Schema.model_validate({"label": "click", "fields": fields})


@pytest.mark.parametrize(
    ("stage", "terms"),
    [
        ("pretrain", GENERATIVE),
        ("joint", GENERATIVE | {"click"}),
        ("finetune", {"click"}),
        ("scratch", {"click"}),
    ],
)
@pytest.mark.parametrize("table_l2", [0.0, 0.1])
def test_a_stage_has_its_terms_and_their_sum_is_the_loss(stage, terms, table_l2):
    loss, outputs = make_model(log(), stage, table_l2=table_l2)(log().batch())
    assert set(outputs.terms) == terms | ({"table_l2"} if table_l2 else set())
    torch.testing.assert_close(loss, sum(outputs.terms.values()))
    assert (outputs.logits is None) == (stage == "pretrain")
    assert (outputs.fields is not None) == ("generative" in terms)
    assert not any(term.requires_grad for term in outputs.terms.values())


def test_without_the_label_in_the_set_there_is_no_label_term():
    config = model_config(noise={"label_in_set": False})
    assert set(make_model(log(), "pretrain", config)(log().batch())[1].terms) == GENERATIVE - {"label"}


@pytest.mark.parametrize("form", ["difficulty", "gradnorm"])
def test_without_the_label_in_the_set_nothing_predicts_it(form):
    config = model_config(noise={"label_in_set": False}, balance=balance_of(form))
    model = make_model(log(), "pretrain", config)
    predictions = []
    model.network.label_head.register_forward_hook(lambda *call: predictions.append(call))
    model(log().batch())
    assert predictions == []


def test_a_probe_without_the_label_in_the_set_measures_the_fields_alone():
    config = model_config(noise={"label_in_set": False}, balance={"form": "gradnorm", "probe_every": 1})
    model = make_model(log(), "pretrain", config)
    probes = []
    model.network.difficulty.observe = lambda fields, probe: probes.append(probe)
    model(log().batch())
    assert probes[0].norms.shape == (len(model.network.fields),)
    assert (probes[0].norms > 0).all()
    assert probes[0].alignment is None


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("head", ["mlp", "label_token"])
@pytest.mark.parametrize("label_in_set", [True, False])
@pytest.mark.parametrize("full_softmax_max", [8, 0])
def test_what_needs_a_gradient_gets_one_in_every_step(stage, head, label_in_set, full_softmax_max):
    config = model_config(
        ctr={"head": head},
        noise={"label_in_set": label_in_set},
        reconstruction={"full_softmax_max": full_softmax_max},
    )
    model = make_model(log(), stage, config)
    model(log().batch())[0].backward()
    missed = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missed == []


@pytest.mark.parametrize("stage", STAGES)
def test_small_vocabularies_alone_leave_nothing_without_a_gradient(stage):
    config = model_config(reconstruction={"full_softmax_max": 1000})
    model = make_model(log(), stage, config, schema=without("history"))
    batch = log().batch()
    keep = [t for t, token in enumerate(SCHEMA.tokens) if token.field != "history"]
    for name in ("ids", "log_prior", "log_rate"):
        setattr(batch, name, getattr(batch, name)[:, keep])
    model(batch)[0].backward()
    missed = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missed == []


def trained_parts(model):
    return {name.split(".")[0] for name, p in model.network.named_parameters() if p.requires_grad}


def test_every_stage_freezes_what_it_does_not_train():
    generative = {"corruption", "denoiser", "reconstruction", "difficulty", "label_head"}
    assert trained_parts(make_model(log(), "pretrain")) == generative
    assert trained_parts(make_model(log(), "joint")) == generative | {"ctr_head"}
    assert trained_parts(make_model(log(), "finetune")) == {"denoiser", "ctr_head"}
    by_label = model_config(ctr={"head": "label_token"})
    assert trained_parts(make_model(log(), "finetune", by_label)) == {"denoiser", "label_head"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_the_tables(stage):
    model = make_model(log(), stage)
    model(log().batch())[0].backward()
    for name, weight in tables_of(model).items():
        assert weight.grad.abs().max() > 0, name


def test_joint_training_is_click_training_plus_pretraining_on_one_lookup():
    models = {stage: make_model(log(), stage) for stage in ("joint", "pretrain", "scratch")}
    for model in models.values():
        model.load_state_dict(models["joint"].state_dict())
    losses = {stage: model(log().batch())[0] for stage, model in models.items()}
    torch.testing.assert_close(losses["joint"], losses["pretrain"] + losses["scratch"])
    for loss in losses.values():
        loss.backward()
    grads = {stage: tables_of(model)["item"].grad for stage, model in models.items()}
    torch.testing.assert_close(grads["joint"], grads["pretrain"] + grads["scratch"])


@pytest.mark.parametrize("stage", STAGES)
def test_padding_rows_do_not_count(stage):
    model = make_model(log(), stage, table_l2=0.1)
    plain = model(log().batch())[1].terms
    padded = model(log().batch(padding=9))[1].terms
    assert set(plain) == set(padded)
    for name, term in plain.items():
        torch.testing.assert_close(padded[name], term, msg=name)


def test_table_l2_is_unbiased_over_the_batches_of_an_epoch():
    model = make_model(log(), "scratch", table_l2=0.3)
    tables = tables_of(model)
    with torch.no_grad():
        tables["genres"].zero_()  # bags are regularised by their pooled vector, an approximation
    batches = [replace(log().batch(start, start + 8), num_real_rows=8) for start in range(0, 64, 8)]
    estimates = torch.stack([model(batch)[1].terms["table_l2"] for batch in batches])
    whole = torch.tensor(0.0)
    for name, weight in tables.items():
        seen = torch.from_numpy(
            sum(f.counts for f in log().statistics.fields.values() if f.table == name) > 0
        )
        whole += 0.5 * weight[seen].detach().square().sum()
    torch.testing.assert_close(estimates.mean(), 0.3 * whole)
    assert estimates.std() > 0


def test_table_l2_pulls_every_looked_up_row_to_zero_and_nothing_else():
    model = make_model(log(), "scratch", table_l2=0.3)
    plain = make_model(log(), "scratch")
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        each(log().batch())[0].backward()
    weight = tables_of(model)["user"]
    pull = weight.grad - tables_of(plain)["user"].grad
    seen = torch.from_numpy(log().statistics.fields["user"].counts > 0)
    # The batch is the whole log, so the estimate is exact.
    torch.testing.assert_close(pull[seen], 0.3 * weight.detach()[seen], rtol=1e-3, atol=1e-4)
    assert (pull[~seen] == 0).all()


def train_steps(model, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        loss, outputs = model(log().batch(step=step))
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
    return outputs


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_balancing_trains(form, precision):
    config = model_config(balance=balance_of(form))
    model = make_model(log(), "joint", config, precision=precision)
    train_steps(model, 3)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert (model.network.difficulty.scalars != 0).any()


@pytest.mark.parametrize("guidance", get_args(AttentionGuidance))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_guidance_trains(guidance, precision):
    config = model_config(denoiser={"attention": {"guidance": guidance}})
    model = make_model(log(), "joint", config, precision=precision)
    with torch.no_grad():
        model.network.difficulty.difficulty.normal_()
    train_steps(model, 2)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_bf16_is_close_to_fp32():
    exact = make_model(log(), "joint")
    rounded = make_model(log(), "joint", precision="bf16")
    rounded.load_state_dict(exact.state_dict())
    terms, approximate = exact(log().batch())[1].terms, rounded(log().batch())[1].terms
    for name, term in terms.items():
        torch.testing.assert_close(approximate[name], term, rtol=0.03, atol=0.01, msg=name)
        assert approximate[name].dtype == torch.float32


def test_losses_are_averaged_in_full_precision_under_bf16():
    network = make_model(log(), "pretrain", precision="bf16").network
    rows, num_fields = 1001, len(network.fields)
    losses = RowLosses(
        torch.rand(rows, num_fields),
        torch.ones(rows, num_fields) > 0,
        torch.ones(num_fields),
        torch.ones(num_fields),
    )
    corrupted = Corrupted(torch.empty(0), torch.empty(0), torch.empty(0), torch.rand(rows))
    with torch.autocast("cpu", torch.bfloat16):
        share, fields = network._reduce(losses, corrupted)
    torch.testing.assert_close(share[:, 0], losses.loss.mean(0))
    torch.testing.assert_close(fields.cross_entropy[:, 0], losses.loss.mean(0))


def test_an_untrained_model_is_at_chance():
    config = model_config(reconstruction={"temperature": 1.0})
    relative = make_model(log(), "pretrain", config)(log().batch())[1].fields.relative
    assert relative.min() > 0.8
    assert relative.max() < 1.5


def test_the_generative_term_is_the_mean_of_weighted_relative_losses():
    model = make_model(log(), "pretrain", model_config(balance={"exponent": 1.0}))
    with torch.no_grad():
        model.network.difficulty.difficulty.copy_(torch.linspace(-1, 1, len(model.network.fields))[:, None])
    outputs = model(log().batch())[1]
    weights = model.network.difficulty.weights()[:, 0]
    relative = outputs.fields.cross_entropy[:, 0] / outputs.fields.chance
    torch.testing.assert_close(outputs.terms["generative"], (weights * relative).mean())


def test_difficulty_is_moved_by_its_calibration_alone():
    model = make_model(log(), "joint")
    loss, outputs = model(log().batch())
    loss.backward()
    # One step of size k makes e^s (1 - k) e^s + k r; the gain in attention and the weights pass nothing on.
    rate = model.network.difficulty.config.learning_rate
    step = -rate * model.network.difficulty.difficulty.grad
    torch.testing.assert_close(step.exp(), 1 - rate + rate * outputs.fields.relative)


def test_the_literal_form_is_a_sum_over_fields():
    model = make_model(log(), "pretrain", model_config(balance={"form": "literal"}))
    outputs = model(log().batch())[1]
    torch.testing.assert_close(outputs.terms["generative"], outputs.fields.cross_entropy.sum())


def test_guidance_is_neutral_for_the_label_and_for_fields_without_a_head():
    described = SCHEMA.model_dump(mode="json")
    described["fields"][SCHEMA.field_names.index("user")]["reconstruct"] = False
    model = make_model(log(), "pretrain", schema=Schema.model_validate(described))
    network = model.network
    with torch.no_grad():
        network.difficulty.difficulty.copy_(torch.arange(1.0, len(network.fields) + 1)[:, None])
    guidance = network.guidance()
    gain, bias = network.difficulty.gain(), network.difficulty.key_bias()
    assert guidance.gain.shape == guidance.key_bias.shape == (len(TOKENS) + 1,)
    for place in (column("user"), -1):
        assert guidance.gain[place] == 1.0
        assert guidance.key_bias[place] == 0.0
    for place, token in enumerate(SCHEMA.tokens):
        if token.field != "user":
            index = network.fields.index(token.field)
            assert guidance.gain[place] == gain[index]
            assert guidance.key_bias[place] == bias[index]


def test_scores_do_not_look_at_the_label():
    for stage in STAGES:
        model = make_model(log(), stage).eval()
        batch = log().batch()
        before = model(batch)[1].logits
        batch.labels = 1 - batch.labels
        assert torch.equal(model(batch)[1].logits, before)


@torch.no_grad()
@pytest.mark.parametrize("head", ["mlp", "label_token"])
def test_scores_are_those_of_a_masked_label(head):
    model = make_model(log(), "finetune", model_config(ctr={"head": head})).eval()
    before = model(log().batch())[1].logits
    embedding = model.network.denoiser.label_embedding.weight
    embedding[:LABEL_MASK_ID] += 1.0
    assert torch.equal(model(log().batch())[1].logits, before)
    embedding[LABEL_MASK_ID] += torch.arange(embedding.shape[1])
    assert not torch.equal(model(log().batch())[1].logits, before)


def test_scoring_draws_no_noise_and_needs_no_neighbours():
    for stage in STAGES:
        model = make_model(log(), stage).eval()
        whole = model(log().batch())[1]
        part = model(log().batch(10, 20, noise_seed=5))[1]
        assert set(whole.terms) == {"click"}
        torch.testing.assert_close(part.logits, whole.logits[10:20])


def test_a_pretrained_model_scores_by_its_label_element():
    model = make_model(log(), "pretrain").eval()
    before = model(log().batch())[1].logits
    with torch.no_grad():
        model.network.label_head.classes.bias += torch.tensor([0.0, 1.0])
    torch.testing.assert_close(model(log().batch())[1].logits, before + 1.0)


def test_probes_come_once_in_so_many_steps():
    batch = log().batch(0, 1)
    probes = 0
    for step in range(2000):
        batch.cursor = Cursor(0, (Served(1, step * 64),))
        probes += _is_one_in(10, batch)
    assert probes == pytest.approx(200, abs=50)


def test_a_probe_measures_the_gradient_of_every_field_on_the_last_shared_weight():
    config = model_config(
        balance={"form": "aligned", "probe_every": 1}, denoiser={"attention": {"guidance": "none"}}
    )
    model = make_model(log(), "pretrain", config)
    network, probes = model.network, []
    network.difficulty.observe = lambda fields, probe: probes.append(probe)

    def gradient(weights):
        model.zero_grad()
        network.difficulty.weights = lambda: weights[:, None]
        model(log().batch())[0].backward()
        return network.denoiser.shared_weight.grad.clone()

    num_fields = len(network.fields)
    of_label = gradient(torch.zeros(num_fields))
    for index in range(num_fields):
        of_field = gradient(num_fields * torch.eye(num_fields)[index]) - of_label
        cosine = torch.cosine_similarity(of_field.flatten(), of_label.flatten(), dim=0)
        torch.testing.assert_close(probes[-1].norms[index], of_field.norm(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(probes[-1].alignment[index], cosine, rtol=1e-3, atol=1e-4)


def test_training_lowers_the_loss_of_every_field():
    model = make_model(log(), "pretrain", model_config(noise={"t_min": 0.1}))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    relative = []
    for _ in range(60):
        optimizer.zero_grad()
        loss, outputs = model(log().batch())
        loss.backward()
        optimizer.step()
        relative.append(outputs.fields.relative[:, 0])
    assert (relative[-1] < 0.7 * relative[0]).all()


def test_the_network_is_built_alike_from_a_seed():
    one, same = (make_model(log(), "joint").network.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_marginal_noise_swaps_full_softmax_fields_only():
    network = make_model(log(), "pretrain", model_config(noise={"kind": "marginal"})).network
    assert isinstance(network.corruption, Diffusion)
    swapped = [
        token.field for token, may in zip(SCHEMA.tokens, network.corruption.may_swap, strict=True) if may
    ]
    assert swapped == FULL
    assert network.fields == FULL + SAMPLED


def test_marginal_noise_without_a_field_to_swap_is_an_error():
    config = model_config(noise={"kind": "marginal"}, reconstruction={"full_softmax_max": 1})
    with pytest.raises(ValueError, match=r"noise\.kind: marginal .*full_softmax_max"):
        make_model(log(), "pretrain", config)
    make_model(log(), "scratch", config)


@pytest.mark.parametrize("stage", ["pretrain", "joint"])
def test_nothing_to_reconstruct_is_an_error(stage):
    described = SCHEMA.model_dump(mode="json")
    for field in described["fields"]:
        field["reconstruct"] = False
    schema = Schema.model_validate(described)
    with pytest.raises(ValueError, match=f"`{stage}` has nothing to reconstruct"):
        build_model(schema, log().statistics, model_config(), TrainConfig(), stage, StageConfig(), 0)
    build_model(schema, log().statistics, model_config(), TrainConfig(), "scratch", StageConfig(), 0)


def test_in_training_the_baseline_of_a_full_softmax_is_the_entropy_under_the_dropout_of_the_stage():
    """Dropped cells are no targets, and rows that are scored have none."""
    statistics, config = log().statistics, StageConfig(oov_dropout=5.0)
    model = build_model(SCHEMA, statistics, model_config(), TrainConfig(), "pretrain", config, 0)
    batch = log().batch()
    tokens = torch.randn(batch.num_rows, len(TOKENS), model_config().dim)
    for is_training, dropout in ((True, 5.0), (False, 0.0)):
        _, _, losses = model.network.train(is_training).reconstruct(tokens, batch.ids >= 0, batch)
        found = losses.baseline[: len(FULL)].tolist()
        assert found == pytest.approx([statistics.entropy(name, dropout) for name in FULL], rel=1e-6)
    assert all(statistics.entropy(name, 5.0) < statistics.entropy(name) for name in FULL)
