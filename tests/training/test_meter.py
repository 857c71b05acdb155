"""What a line of the log says of the fields: means over the steps in which they had a target."""

from types import SimpleNamespace

import pytest
import torch

from hetegen_rec.config.balance import BalanceConfig
from hetegen_rec.models.difficulty import Difficulty, FieldLosses, Probe
from hetegen_rec.training.meter import Meter

NAMES = ["dense", "sparse", "never"]
CHANCE = torch.full((3,), 4.0)


def outputs_of(cross_entropy, share, probe=None):
    """A step's outputs, with losses and shares of targets [F, K]."""
    fields = FieldLosses(torch.tensor(cross_entropy), torch.tensor(share), CHANCE, CHANCE, probe)
    return SimpleNamespace(terms={"generative": torch.tensor(1.0)}, fields=fields)


def fields_of(steps):
    meter = Meter()
    for one in steps:
        meter.add(one, rows=8)
    return meter.read(Difficulty(len(NAMES), BalanceConfig()), NAMES)["fields"]


def steps_of(bins, probe=None):
    """Ten steps, in two of which the second field has targets, all in the last of so many bins."""
    none = [0.0] * (bins - 1)
    rows = [([1.0, 2.0, 0.0], [1.0, 1.0, 0.0])] * 2 + [([1.0, 0.0, 0.0], [1.0, 0.0, 0.0])] * 8
    for losses, shares in rows:
        yield outputs_of([[*none, loss] for loss in losses], [[*none, share] for share in shares], probe)


@pytest.mark.parametrize("bins", [1, 3])
def test_losses_are_means_over_the_steps_in_which_the_field_had_a_target(bins):
    fields = fields_of(steps_of(bins))
    assert fields["dense"]["loss"] == pytest.approx(1.0)
    assert fields["sparse"]["loss"] == pytest.approx(2.0)
    assert fields["sparse"]["relative"] == pytest.approx((2.0 + 1e-3) / 4.0)


def test_a_field_that_had_no_target_has_no_losses():
    assert set(fields_of(steps_of(1))["never"]) == {"difficulty", "weight"}


def test_cosines_are_means_over_the_probes_in_which_the_field_had_a_target_and_shares_over_all():
    norms, cosines = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([0.5, -0.5, 0.0])
    first, *rest = steps_of(1, Probe(norms, cosines))
    without = Probe(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.5, 0.0, 0.0]))
    for one in rest[1:]:
        one.fields.probe = without
    fields = fields_of([first, *rest])
    assert fields["dense"]["label_cosine"] == pytest.approx(0.5)
    assert fields["sparse"]["label_cosine"] == pytest.approx(-0.5)
    assert "label_cosine" not in fields["never"]
    shares = [fields[name]["gradient_share"] for name in NAMES]
    assert shares == pytest.approx([(2 * 0.25 + 8) / 10, 2 * 0.75 / 10, 0.0])
