"""A scorer's account of what a strategy costs."""

from types import SimpleNamespace

import pytest
import torch
from copied_log import SCHEMA, make_batch, trained_model
from helpers import lookup_of, plain, rows_of

from hetegen_rec.inference.plain import Plain
from hetegen_rec.inference.scorer import StrategyScorer


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_only_batches_whose_times_are_kept_wait_for_the_device(monkeypatch):
    waits = []
    monkeypatch.setattr("torch.cuda.synchronize", waits.append)
    model = trained_model(8)
    runtime = SimpleNamespace(device=torch.device("cuda"), gather=lambda value: [value])
    scorer = StrategyScorer(lookup_of(model, SCHEMA), "plain", Plain(model.network), runtime)
    batch, timed = make_batch(), []
    for number in range(1, 9):
        before = len(waits)
        assert torch.equal(scorer.probabilities(batch), plain(model, rows_of(model, batch)))
        if len(waits) > before:
            timed.append(number)
    assert timed == [1, 2, 4, 8]
    account = scorer.account()
    assert account["passes_per_row"] == 1.0
    assert account["time_multiple"] > 0
