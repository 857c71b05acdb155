"""Test-time strategies of an artifact: the scores of `evaluate`, from raw rows, without TorchRec."""

import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich_artifact import OOV_DROPOUT, STRATEGIES

from hetegen_rec.data.statistics import Statistics
from hetegen_rec.main import main
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.scoring.scorer import Scorer


@pytest.mark.parametrize("backend", ["aten", "fbgemm"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_artifact_scores_as_evaluate_does(strategy, backend, rich_run):
    found = rich_run.scorer(backend=backend).score(rich_run.raw("test"), strategy)
    expected = rich_run.evaluated("test", strategy)
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)


def test_frequencies_are_those_of_training_under_dropout(rich_run):
    artifact = rich_run.scorer().artifact
    statistics = Statistics.load(rich_run.directory / "prepared")
    expected = [statistics.log_rate(table, OOV_DROPOUT) for table in artifact.manifest.vocabularies]
    np.testing.assert_array_equal(np.load(artifact.path("strategies/log_rate.npy")), np.concatenate(expected))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_changes_scores(strategy, rich_run):
    scorer, rows = rich_run.scorer(), rich_run.raw("test")
    assert np.abs(scorer.score(rows, strategy) - scorer.score(rows)).max() > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_rows_have_equal_scores_wherever_they_stand(strategy, rich_run):
    scorer, rows = rich_run.scorer(), rich_run.raw("test")
    index = np.random.default_rng(0).permutation(len(rows))[:40]
    index = np.concatenate([index, index[:10]])
    found = scorer.score(rows.take(index), strategy)
    np.testing.assert_allclose(found, scorer.score(rows, strategy)[index], atol=1e-6, rtol=0)


def test_rows_without_values_and_with_unknown_ones_are_scored(rich_run):
    scorer = rich_run.scorer()
    rows = [{}, {"user_id": -5, "item_id": 10**9, "tags": ["new"], "history": [1, 2, 3, 4, 5]}]
    for strategy in STRATEGIES:
        alone = [scorer.score([row], strategy)[0] for row in rows]
        np.testing.assert_allclose(scorer.score(rows, strategy), alone, atol=1e-6, rtol=0)
        assert len(scorer.score([], strategy)) == 0


def test_the_gate_measures_every_strategy(rich_run):
    for found in rich_run.scorer().artifact.manifest.parity.values():
        assert set(found["strategies"]) == set(STRATEGIES)
        for measured in found["strategies"].values():
            assert measured["rows"] == 240
            assert measured["greatest_difference"] < 1e-5


def test_the_command_scores_by_a_strategy(rich_run, tmp_path):
    inputs, output = str(rich_run.directory / "raw" / "test" / "*.parquet"), tmp_path / "scores.parquet"
    artifact = str(rich_run.directory / "artifact")
    assert main(["score", "--strategy", "uncertainty", artifact, inputs, str(output)]) == 0
    expected = rich_run.scorer().score(rich_run.raw("test"), "uncertainty")
    np.testing.assert_array_equal(pq.read_table(output)["probability"].to_numpy(), expected)


def test_a_strategy_that_the_artifact_lacks_is_refused(rich_run):
    with pytest.raises(ArtifactError, match=r"no strategy 'symmetric'; it has plain, uncertainty"):
        rich_run.scorer().score(rich_run.raw("test"), "symmetric")


@pytest.mark.parametrize("file", ["strategies/dropped.npy", "network/aten_logits.pt2"])
def test_a_changed_file_of_a_strategy_is_refused(file, rich_run, tmp_path):
    artifact = tmp_path / "artifact"
    shutil.copytree(rich_run.directory / "artifact", artifact)
    content = bytearray((artifact / file).read_bytes())
    content[-1] ^= 1
    (artifact / file).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{file} was changed"):
        Scorer.load(artifact)


def test_strategies_need_no_torchrec(rich_run):
    program = (
        "import sys\n"
        "sys.modules['torchrec'] = sys.modules['fbgemm_gpu'] = None\n"
        "from hetegen_rec.scoring.scorer import Scorer\n"
        "scorer = Scorer.load(sys.argv[1], backend='aten')\n"
        f"print(*(float(scorer.score([{{}}], name)[0]) for name in {STRATEGIES!r}))\n"
    )
    artifact = str(rich_run.directory / "artifact")
    command = [sys.executable, "-c", program, artifact]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    expected = [rich_run.scorer(backend="aten").score([{}], name)[0] for name in STRATEGIES]
    assert [float(word) for word in printed.split()] == pytest.approx(expected, abs=1e-6)


def test_a_strategy_that_cannot_be_exported_is_refused(rich_run, tmp_path, capsys):
    assert rich_run.hetegen("export", "--output", str(tmp_path / "new"), "export.strategies=[symmetric]") == 2
    assert "should be 'plain', 'feature_paths' or 'uncertainty'" in capsys.readouterr().err
