"""How well held-out rows are reconstructed: the same figures however the rows are spread."""

import math

import pytest
import torch
from multirank import run_ranks
from small_log import Log
from tiny_run import FIELDS, tiny_config

from hetegen_rec.distributed.runtime import start_runtime
from hetegen_rec.training.held_out import measure_reconstruction, with_fixed_noise
from hetegen_rec.training.setup import build_sharded, open_split
from hetegen_rec.training.stages import prepare_data

# Heads that take nothing from the other rows of a rank, at first.
WITHOUT_HISTORY = [{**field, "reconstruct": field["kind"] != "sequence"} for field in FIELDS]
OWN_ROWS = [f"features.fields={WITHOUT_HISTORY}", "model.reconstruction.full_softmax_max=1000"]


def measured(directory, *overrides):
    """Results of an untrained model, whose weights depend on no number of ranks."""
    config = tiny_config(directory, *overrides)
    with start_runtime("cpu", timeout_seconds=60) as runtime:
        torch.set_num_threads(1)
        statistics = prepare_data(config, runtime)
        model = build_sharded(config, "pretrain", statistics, runtime)
        reader = open_split(config, "valid", statistics, runtime, stage="pretrain")
        return measure_reconstruction(model, reader, config.features, runtime)


def numbers_in(one):
    own = {key: value for key, value in one.items() if key not in ("among", "levels")}
    levels = enumerate(one["levels"])
    return own | {f"{key} {place}": value for place, level in levels for key, value in level.items()}


def test_every_number_of_ranks_finds_the_same(tmp_path):
    alone = measured(tmp_path, *OWN_ROWS)
    assert {one["among"] for one in alone.values()} == {"vocabulary"}
    for found in run_ranks(3, measured, tmp_path, *OWN_ROWS, "train.eval_batch_size=60"):
        assert list(found) == list(alone)
        for name, one in alone.items():
            assert numbers_in(found[name]) == pytest.approx(numbers_in(one), rel=1e-4), name


def test_an_untrained_model_guesses(tmp_path):
    found = measured(tmp_path)
    intent, history = found["intent"], found["history"]
    assert intent["chance"] == pytest.approx(math.log(64))
    assert intent["relative"] == pytest.approx(1.0, abs=0.1)
    assert intent["cross_entropy"] == pytest.approx(intent["relative"] * intent["chance"], abs=2e-3)
    assert 3 / 64 < intent["top_10"] < 30 / 64
    assert (intent["among"], history["among"]) == ("vocabulary", "candidates")
    assert 0.0 < history["baseline"] < history["chance"]  # some items are frequent
    assert all(0.0 <= one["top_1"] <= one["top_10"] <= 1.0 for one in found.values())


def test_noise_levels_split_the_targets(tmp_path):
    for name, one in measured(tmp_path).items():
        counts = [level["targets"] for level in one["levels"]]
        assert sum(counts) == one["targets"] > 0
        assert counts == sorted(counts), name  # more is masked at higher levels
        total = sum(level["cross_entropy"] * level["targets"] for level in one["levels"])
        assert total / one["targets"] == pytest.approx(one["cross_entropy"])


def test_a_row_has_the_same_noise_whoever_reads_it():
    log = Log(64)
    whole, part = (with_fixed_noise(log.batch(*rows)) for rows in ((0, 64), (40, 64)))
    torch.testing.assert_close(part.strata, whole.strata[40:], rtol=0, atol=0)
    assert (part.noise_seed, part.cursor) == (whole.noise_seed, whole.cursor)
    counts = torch.histc(whole.strata, bins=8, min=0.0, max=1.0)
    assert counts.min() >= 7
    assert counts.max() <= 9
