"""Rows of held ids move by their share of what they would, whatever else is in the loss."""

from dataclasses import replace

import pytest
import torch
from small_log import Log, column, make_model, model_config, tables_of

from hetegen_rec.config.run import Stage


def gradients(movement: torch.Tensor | None, stage: Stage) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the tables and of one weight behind them."""
    torch.manual_seed(0)
    log = Log()
    model = make_model(log, stage, model_config(), table_l2=0.1)
    batch = log.batch()
    loss, _ = model(replace(batch, movement=movement))
    loss.backward()
    found = {table: weight.grad for table, weight in tables_of(model).items() if weight.grad is not None}
    return loss.item(), found | {"head": model.network.ctr_head.mlp[0].weight.grad}


@pytest.mark.parametrize("stage", ["scratch", "joint"])
def test_a_held_table_moves_less_and_the_rest_as_before(stage: Stage) -> None:
    batch = Log().batch()
    held = torch.ones(batch.ids.shape)
    held[:, column("place")] = 0.25
    free_loss, free = gradients(None, stage)
    held_loss, with_held = gradients(held, stage)
    assert held_loss == free_loss
    for name, gradient in free.items():
        factor = 0.25 if name == "place" else 1.0
        torch.testing.assert_close(with_held[name], factor * gradient)
    assert free["place"].abs().sum() > 0


def test_factors_are_those_of_the_cell_where_fields_share_a_table() -> None:
    batch = Log().batch()
    history_held = torch.ones(batch.ids.shape)
    history_held[:, [column(f"history:{position}") for position in range(3)]] = 1e-6
    _, free = gradients(None, "scratch")
    _, held = gradients(history_held, "scratch")
    targets = batch.ids[:, column("item")].unique()
    only_in_history = torch.tensor(sorted(set(range(len(free["item"]))) - set(targets.tolist())))
    assert free["item"][only_in_history].abs().sum() > 0
    assert held["item"][only_in_history].abs().max() < 1e-5
    assert held["item"][targets].abs().sum() > 0.1 * free["item"][targets].abs().sum()
