"""The baselines: their formulas, what may not matter to a score, and that each learns."""

from functools import cache
from typing import get_args

import pytest
import torch
from small_log import DIM, HISTORY, SCHEMA, TOKENS, Log, column, make_model, model_config, tables_of
from torch.nn import functional
from torchrec import KeyedTensor

from hetegen_rec.config.backbone import BackboneConfig, BackboneName
from hetegen_rec.evaluation.metrics import auc
from hetegen_rec.models.backbones.autoint import InteractingLayer
from hetegen_rec.models.backbones.dcnv2 import DCNV2
from hetegen_rec.models.backbones.din import TargetAttentionPooling
from hetegen_rec.models.backbones.factorization import FM, DeepFM
from hetegen_rec.models.backbones.finalmlp import BilinearFusion, FeatureGate, FinalMLP
from hetegen_rec.models.backbones.layers import FirstOrder
from hetegen_rec.models.backbones.masknet import MaskBlock
from hetegen_rec.models.generation import FeatureGenerator

NAMES = [name for name in get_args(BackboneName) if name != "hetegen"]
NUM_FIELDS = len(SCHEMA.fields)
ROWS = 16


@cache
def log():
    return Log(64)


def model_of(name, stage="scratch", schema=SCHEMA, precision="fp32", **settings):
    config = model_config(backbone={"name": name, **settings})
    return make_model(log(), stage, config, schema=schema, precision=precision, table_l2=0.1)


def fields_of_rows(seed=1):
    return torch.randn(ROWS, NUM_FIELDS, DIM, generator=torch.Generator().manual_seed(seed))


def tokens_of_rows(seed=1):
    tokens = torch.randn(ROWS, len(TOKENS), DIM, generator=torch.Generator().manual_seed(seed))
    return tokens, Log(ROWS).batch().ids >= 0


every_backbone = pytest.mark.parametrize("name", NAMES)
with_and_without_generation = pytest.mark.parametrize("generate", [False, True], ids=["plain", "generated"])


SETTINGS = {
    **{name: {"name": name} for name in NAMES},
    "deepfm-linear": {"name": "deepfm", "hidden": ()},
    "dcnv2-stacked-low-rank": {"name": "dcnv2", "structure": "stacked", "rank": 2},
    "autoint-no-deep-part": {"name": "autoint", "hidden": (), "num_heads": 1},
    "masknet-narrow": {"name": "masknet", "hidden": (), "reduction_ratio": 0.01, "num_blocks": 1},
    "finalmlp-gates": {"name": "finalmlp", "first_gate": ("user",), "second_gate": ("item", "history")},
    "din-linear-attention": {"name": "din", "attention_hidden": ()},
}


@pytest.mark.parametrize("case", SETTINGS)
@with_and_without_generation
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_scores_every_row_and_trains_every_weight(case, generate, precision):
    model = model_of(**SETTINGS[case], generate=generate, precision=precision)
    loss, outputs = model(log().batch())
    loss.backward()
    assert outputs.logits.shape == (64,)
    assert outputs.logits.dtype == torch.float32
    assert set(outputs.terms) == {"click", "table_l2"}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert [name for name, weight in trained.items() if weight.grad is None or not weight.grad.any()] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("lr", "fm")])
def test_dropout_acts_in_training_only(name):
    model = model_of(name, dropout=0.5)
    assert not torch.equal(*(model(log().batch())[1].logits for _ in range(2)))
    model.eval()
    assert torch.equal(*(model(log().batch())[1].logits for _ in range(2)))


@every_backbone
def test_padding_rows_do_not_count(name):
    model = model_of(name)
    plain, padded = model(log().batch()), model(log().batch(padding=9))
    torch.testing.assert_close(padded[0], plain[0])
    torch.testing.assert_close(padded[1].logits[:64], plain[1].logits)


@torch.no_grad()
@every_backbone
@with_and_without_generation
def test_what_stands_in_absent_positions_does_not_change_a_score(name, generate):
    network = model_of(name, generate=generate).eval().network
    tokens, present = tokens_of_rows()
    before = network.score(tokens, present)
    tokens[~present] = 100.0
    assert (~present).any()
    torch.testing.assert_close(network.score(tokens, present), before)


@torch.no_grad()
@every_backbone
def test_the_order_in_which_tables_are_looked_up_does_not_matter(name):
    model = model_of(name).eval()
    batch = log().batch()
    rows = model.ebc(batch.kjt).to_dict()
    backwards = KeyedTensor.from_tensor_list(list(reversed(rows)), [rows[key] for key in reversed(rows)])
    torch.testing.assert_close(model.network(backwards, batch)[1].logits, model(batch)[1].logits)


@torch.no_grad()
@every_backbone
@with_and_without_generation
def test_every_field_moves_the_score(name, generate):
    network = model_of(name, generate=generate).eval().network
    tokens, present = tokens_of_rows()
    present[:] = True
    before = network.score(tokens, present)
    for token in range(len(TOKENS)):
        changed = tokens.clone()
        changed[:, token] += 1.0
        assert (network.score(changed, present) != before).any(), TOKENS[token]


@cache
def planted():
    """A log whose clicks are the parity of two fields, which neither says much about alone."""
    made = Log(1500, seed=3)
    batches = made.batch(0, 1000), made.batch(1000, 1500)
    for batch in batches:
        parity = (batch.ids[:, column("user")] + batch.ids[:, column("place")]) % 2
        batch.labels = parity.float()
    return made, *batches


@cache
def learnt_auc(name, generate=False):
    """AUC on rows that were not trained on."""
    made, train, test = planted()
    model = make_model(made, "scratch", model_config(backbone={"name": name, "generate": generate}))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(train)[0].backward()
        optimizer.step()
    logits = model.eval()(test)[1].logits
    return auc(logits.sigmoid().numpy(), test.labels.numpy())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lr"])
def test_an_interaction_of_two_fields_is_learnt(name):
    assert learnt_auc("lr") < 0.75
    assert learnt_auc(name) > 0.9


def test_on_generated_features_even_a_linear_model_learns_an_interaction():
    assert learnt_auc("lr", generate=True) > 0.9


@torch.no_grad()
def test_lr_is_linear_in_every_field_and_starts_near_zero():
    model = FirstOrder(NUM_FIELDS, DIM)
    fields, others = fields_of_rows(), fields_of_rows(seed=2)
    torch.testing.assert_close(model(fields + 2 * others), model(fields) + 2 * model(others))
    assert model(torch.zeros_like(fields)).abs().max() == 0
    norms = model.readout.weight.view(NUM_FIELDS, DIM).norm(dim=1)
    assert ((norms > 0.3) & (norms < 3)).all()


def test_fm_is_the_first_order_terms_and_the_dot_products_of_all_pairs():
    model, fields = FM(NUM_FIELDS, DIM), fields_of_rows().requires_grad_()
    expected = model.first_order(fields)
    for i in range(NUM_FIELDS):
        for j in range(i):
            expected = expected + (fields[:, i] * fields[:, j]).sum(1)
    found, upstream = model(fields), fields_of_rows(seed=2)[:, 0, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradients = (torch.autograd.grad(logits, fields, upstream) for logits in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_deepfm_is_a_machine_and_a_deep_part():
    model, fields = DeepFM(NUM_FIELDS, DIM, BackboneConfig(name="deepfm")), fields_of_rows()
    torch.testing.assert_close(model(fields), model.machine(fields) + model.deep(fields.flatten(1)))


@torch.no_grad()
@pytest.mark.parametrize("structure", ["parallel", "stacked"])
@pytest.mark.parametrize("rank", [None, 3])
def test_dcnv2_crosses_by_its_formula(structure, rank):
    config = BackboneConfig(name="dcnv2", structure=structure, rank=rank, num_layers=2, hidden=(5,))
    model, fields = DCNV2(NUM_FIELDS, DIM, config), fields_of_rows()
    for weight in model.cross.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    row = crossed = fields.flatten(1)
    for layer in range(2):
        if rank is None:
            matrix = model.cross.kernels[layer]
        else:
            matrix = model.cross.W_kernels[layer] @ model.cross.V_kernels[layer]
        crossed = row * (crossed @ matrix.T + model.cross.bias[layer].flatten()) + crossed
    behind = model.hidden(crossed) if structure == "stacked" else torch.cat([crossed, model.hidden(row)], 1)
    torch.testing.assert_close(model(fields), model.output(behind)[:, 0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_autoint_attends_by_plain_dot_products():
    layer, fields = InteractingLayer(DIM, 2, dropout=0.0), fields_of_rows()
    query, key, value = layer.query_key_value(fields).chunk(3, dim=-1)
    heads = []
    for head in (slice(0, DIM // 2), slice(DIM // 2, DIM)):
        weights = (query[..., head] @ key[..., head].transpose(1, 2)).softmax(-1)
        heads.append(weights @ value[..., head])
    expected = torch.relu(torch.cat(heads, -1) + layer.residual(fields))
    torch.testing.assert_close(layer(fields), expected)


@torch.no_grad()
def test_a_mask_block_multiplies_features_by_a_mask_made_of_the_row():
    config = BackboneConfig(name="masknet", reduction_ratio=0.5, block_width=6)
    width = NUM_FIELDS * DIM
    block = MaskBlock(width, config)
    row, features = fields_of_rows().flatten(1), fields_of_rows(seed=2).flatten(1)
    narrow, _, wide = block.mask
    assert narrow.out_features == width // 2
    mask = wide(torch.relu(narrow(row)))
    expected = torch.relu(functional.layer_norm((mask * features) @ block.hidden.weight.T, (6,)))
    torch.testing.assert_close(block(row, features), expected)


@torch.no_grad()
def test_bilinear_fusion_is_a_sum_over_blocks():
    fusion = BilinearFusion(6, num_heads=2)
    first, second = torch.randn(ROWS, 6), torch.randn(ROWS, 6)
    expected = fusion.first(first)[:, 0] + fusion.second(second)[:, 0]
    for head, block in enumerate((slice(0, 3), slice(3, 6))):
        expected = expected + ((first[:, block] @ fusion.interaction[head]) * second[:, block]).sum(1)
    torch.testing.assert_close(fusion(first, second), expected)


@torch.no_grad()
def test_a_gate_looks_at_its_fields_alone_and_is_the_same_for_all_rows_without_any():
    config = BackboneConfig(name="finalmlp", first_gate=("user", "hour"))
    names, fields = SCHEMA.field_names, fields_of_rows()
    gate = FeatureGate(names, config.first_gate, DIM, config)
    factors = gate(fields)
    assert factors.shape == (ROWS, NUM_FIELDS * DIM)
    assert ((factors > 0) & (factors < 2)).all()
    seen = [names.index("user"), names.index("hour")]
    others = [index for index in range(NUM_FIELDS) if index not in seen]
    changed = fields.clone()
    changed[:, others] += 1.0
    assert torch.equal(gate(changed), factors)
    changed[:, seen[1]] += 1.0
    assert not torch.equal(gate(changed), factors)
    assert FeatureGate(names, (), DIM, config)(fields).shape == (1, NUM_FIELDS * DIM)


@torch.no_grad()
def test_finalmlp_fuses_two_gated_streams():
    model, fields = FinalMLP(SCHEMA.field_names, DIM, BackboneConfig(name="finalmlp")), fields_of_rows()
    row = fields.flatten(1)
    streams = [model.streams[i](row * model.gates[i](fields)) for i in range(2)]
    assert not torch.equal(*streams)
    torch.testing.assert_close(model(fields), model.fusion(*streams))


def din_pooling():
    torch.manual_seed(0)
    return TargetAttentionPooling(SCHEMA, DIM, BackboneConfig(name="din"))


@torch.no_grad()
def test_din_weighs_the_present_items_of_a_history_against_the_item():
    pooling = din_pooling()
    tokens, present = tokens_of_rows()
    pooled = pooling(tokens, present)
    unit, target = pooling.units["history"], tokens[:, column("item")]
    lengths = set()
    for row in range(ROWS):
        items = tokens[row, HISTORY][present[row, HISTORY]]
        lengths.add(len(items))
        weights = unit(items[None], target[row : row + 1])[0]
        torch.testing.assert_close(pooled[row, SCHEMA.field_names.index("history")], weights @ items)
    assert lengths == {0, 1, 2, 3}  # of an empty history, the zero vector
    assert torch.equal(pooled[:, SCHEMA.field_names.index("place")], tokens[:, column("place")])


@torch.no_grad()
def test_din_reads_the_same_history_differently_for_another_item():
    pooling = din_pooling()
    tokens, present = tokens_of_rows()
    before = pooling(tokens, present)[:, SCHEMA.field_names.index("history")]
    tokens[:, column("item")] += 1.0
    after = pooling(tokens, present)[:, SCHEMA.field_names.index("history")]
    has_history = present[:, HISTORY].any(1)
    assert (after != before).any(1).equal(has_history)


def test_a_generated_vector_depends_on_every_field_and_keeps_the_scale():
    torch.manual_seed(0)
    generator = FeatureGenerator(NUM_FIELDS, DIM)
    fields = fields_of_rows().requires_grad_()
    generated = generator(fields)
    assert generated.shape == fields.shape
    assert 0.5 < generated.std() < 2.0
    for field in range(NUM_FIELDS):
        (gradient,) = torch.autograd.grad(generated[:, field].sum(), fields, retain_graph=True)
        assert gradient.abs().amax((0, 2)).min() > 0


@pytest.mark.parametrize("stage", ["joint", "finetune", "scratch"])
def test_the_head_of_hetegen_scores_generated_features(stage):
    model = model_of("hetegen", stage, generate=True)
    model(log().batch())[0].backward()
    assert model.network.ctr_head.generator.encoder.weight.grad.any()
    assert all(weight.grad.any() for weight in tables_of(model).values())


def test_pretraining_leaves_the_generator_alone():
    generator = model_of("hetegen", "pretrain", generate=True).network.ctr_head.generator
    assert not any(parameter.requires_grad for parameter in generator.parameters())


@every_backbone
def test_generative_stages_shape_the_tables_of_a_backbone_that_scores_alone(name):
    """Pre-training leaves the backbone alone; afterwards nothing but the backbone reads the tables."""
    pretrained = model_of(name, "pretrain")
    pretrained(log().batch())[0].backward()
    assert not any(parameter.requires_grad for parameter in pretrained.network.backbone.parameters())
    assert all(weight.grad.any() for weight in tables_of(pretrained).values())

    finetuned = model_of(name, "finetune")
    finetuned.load_state_dict(pretrained.state_dict())
    finetuned(log().batch())[0].backward()
    trained = {key for key, parameter in finetuned.network.named_parameters() if parameter.grad is not None}
    assert trained
    assert all(key.startswith("backbone.") for key in trained)


def test_a_joint_stage_trains_a_backbone_on_clean_rows_and_the_denoiser_on_noised_ones():
    model = model_of("deepfm", "joint")
    loss, outputs = model(log().batch())
    loss.backward()
    assert {"click", "generative", "label"} <= set(outputs.terms)
    assert model.network.backbone["deepfm"].scorer.deep.output.weight.grad.any()
    assert model.network.denoiser.shared_weight.grad.any()
    tokens = torch.randn(4, len(SCHEMA.tokens), DIM)
    present = torch.ones(4, len(SCHEMA.tokens), dtype=torch.bool)
    before = model.network.score(tokens, present)
    with torch.no_grad():
        model.network.denoiser.shared_weight.zero_()
    assert model.network.score(tokens, present).equal(before)


def test_no_backbone_has_weights_under_the_names_of_another():
    kinds = [(name, generate) for name in NAMES for generate in (False, True)]
    seen = {}
    for name, generate in kinds:
        network = model_of(name, generate=generate).network
        for key in network.backbone.state_dict():
            assert seen.setdefault(key, (name, generate)) == (name, generate)
    assert set(seen.values()) == set(kinds)


def test_a_baseline_reports_no_fields():
    network = model_of("fm").network
    assert network.fields == []
    assert network.mask_tokens is None
    assert not any(p.requires_grad for p in network.difficulty.parameters())
