"""The network behind the tables in fewer bits."""

import numpy as np
import pytest
import torch
from tiny_artifact import raw_rows, write_tiny_artifact

from hetegen_rec.scoring.scorer import Scorer


@pytest.mark.parametrize("backend", ["aten", "fbgemm"])
def test_a_denoiser_in_bf16_scores_nearly_as_in_fp32(backend, tmp_path):
    rows, scores = raw_rows(300), []
    for dense in ("fp32", "bf16"):
        write_tiny_artifact(tmp_path / dense, dense=dense, backends=(backend,))
        scores.append(Scorer.load(tmp_path / dense, backend=backend).score(rows))
    assert scores[0].std() > 0.05
    assert scores[1].dtype == np.float32
    difference = np.abs(scores[0] - scores[1])
    assert 1e-5 < difference.max() < 0.01


def test_bf16_makes_the_network_smaller(tmp_path):
    sizes = []
    for dense in ("fp32", "bf16"):
        write_tiny_artifact(tmp_path / dense, dense=dense)
        program = torch.export.load(str(tmp_path / dense / "network" / "aten.pt2"))
        sizes.append(sum(tensor.nbytes for tensor in program.state_dict.values()))
    assert sizes[1] < 0.6 * sizes[0]
