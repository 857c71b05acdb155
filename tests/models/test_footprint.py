import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hetegen_rec.config.run import (
    AttentionConfig,
    DenoiserConfig,
    ModelConfig,
    ReconstructionConfig,
    Stage,
    StageConfig,
    TrainConfig,
)
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.expected import expected_statistics
from hetegen_rec.models import footprint
from hetegen_rec.models.footprint import Footprint, Growth, measure_footprint
from hetegen_rec.models.hetegen import build_model

SCHEMA = Schema.model_validate(
    {
        "label": "label",
        "fields": [
            {"name": "user", "kind": "id", "vocabulary": "hash", "hash_size": 2_000_000_000},
            {"name": "item", "kind": "id", "vocabulary": "hash", "hash_size": 5_000},
            {"name": "tags", "kind": "multi_valued", "vocabulary": "hash", "hash_size": 30},
            {"name": "price", "kind": "numeric", "num_buckets": 8},
            {"name": "history", "kind": "sequence", "table": "item", "max_length": 4},
        ],
    }
)
STATISTICS = expected_statistics(SCHEMA, {})
DIM, LAYERS, HEADS = 16, 2, 2


def network(stage: Stage = "pretrain", candidates: int = 1024, precision: str = "fp32") -> nn.Module:
    model = ModelConfig(
        dim=DIM,
        denoiser=DenoiserConfig(num_layers=LAYERS, attention=AttentionConfig(num_heads=HEADS)),
        reconstruction=ReconstructionConfig(num_candidates=candidates),
    )
    train = TrainConfig.model_validate({"precision": precision})
    return build_model(SCHEMA, STATISTICS, model, train, stage, StageConfig(), seed=0).network


def measured(stage: Stage = "pretrain", candidates: int = 1024) -> Footprint:
    return measure_footprint(network(stage, candidates), SCHEMA, STATISTICS)


@pytest.mark.parametrize("candidates", [1024, 20, 3])
def test_a_few_small_steps_tell_of_larger_ones(candidates: int) -> None:
    model = network(candidates=candidates)
    predicted = measure_footprint(model, SCHEMA, STATISTICS)
    rows = footprint._random_rows(SCHEMA, STATISTICS, DIM, 48)
    assert predicted.flops.at(48) == pytest.approx(footprint._count_flops(model, *rows), rel=0.02)
    assert predicted.saved_bytes.at(48) == pytest.approx(footprint._count_saved(model, *rows), rel=0.02)


def test_the_denoiser_costs_what_its_formula_says() -> None:
    length = len(SCHEMA.tokens) + 1
    of_row = LAYERS * length * (16 * DIM**2 + 4 * length * DIM)  # attention and an MLP twice as wide
    model = network("scratch")
    tokens, present = torch.zeros(8, length - 1, DIM), torch.ones(8, length - 1, dtype=torch.bool)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        counter = FlopCounterMode(display=False)
        with counter:
            model.denoise(tokens, present, torch.zeros(8))
    assert counter.get_total_flops() == pytest.approx(8 * of_row, rel=0.05)


def test_joint_training_costs_more_than_either_part() -> None:
    costs = {stage: measured(stage).flops.at(100) for stage in ("pretrain", "scratch", "joint")}
    assert costs["joint"] > 1.2 * max(costs["pretrain"], costs["scratch"])


def test_what_a_stage_freezes_is_not_exchanged() -> None:
    found = measured("scratch")
    assert 0 < found.trained_parameters < found.parameters


def test_a_device_keeps_no_attention_in_fp32_as_a_cpu_does_under_bf16() -> None:
    on_cpu, on_cuda = (
        measure_footprint(network(precision="bf16"), SCHEMA, STATISTICS, device).saved_bytes.at(1)
        for device in ("cpu", "cuda")
    )
    numbers = LAYERS * 4 * (len(SCHEMA.tokens) + 1) * DIM  # queries, keys, values and what comes out
    assert on_cpu - on_cuda >= 2 * numbers


def test_a_device_keeps_no_weights_of_attention_as_a_cpu_does() -> None:
    on_cpu, on_cuda = (measure_footprint(network(), SCHEMA, STATISTICS, device) for device in ("cpu", "cuda"))
    weights = LAYERS * HEADS * (len(SCHEMA.tokens) + 1) ** 2
    assert 0 < on_cpu.saved_bytes.at(1) - on_cuda.saved_bytes.at(1) <= 4 * weights
    assert on_cpu.flops == on_cuda.flops


def test_candidates_are_quadratic_up_to_their_number() -> None:
    growth = Growth(constant=5.0, per_row=2.0, per_pair=1.0, candidates=10)
    assert [growth.at(rows) for rows in (1, 10, 20)] == [8.0, 125.0, 245.0]
