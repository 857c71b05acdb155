"""An environment with torch and little else scores by an artifact, and says what it lacks for more."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_artifact import raw_rows, write_tiny_artifact

from hetegen_rec.scoring.scorer import Scorer

CHECKOUT = Path(__file__).parents[2]
SCORE = """
import json, sys
from hetegen_rec.scoring.scorer import Scorer
scores = Scorer.load(sys.argv[1]).score(json.load(sys.stdin))
spare = {"torchrec", "fbgemm_gpu", "torchx", "pandas", "fastapi"} & set(sys.modules)
print(json.dumps([scores.tolist(), sorted(spare)]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The interpreter of a fresh environment, made as the documentation says."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    pip = [place / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps"]
    pip += ["--no-compile"]  # few of the many modules are imported
    requirements = CHECKOUT / "requirements" / "scoring.txt"
    subprocess.run([*pip, "--retries", "1", "--timeout", "15", "-r", requirements], check=True)
    subprocess.run([*pip, "--no-build-isolation", CHECKOUT], check=True)
    return place / "bin" / "python"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "tiny"
    write_tiny_artifact(path)
    return path


def test_it_scores_as_the_whole_stack_does(python, artifact):
    rows = raw_rows(200)
    told = subprocess.run(
        [python, "-c", SCORE, artifact], input=json.dumps(rows), capture_output=True, text=True, check=True
    )
    scores, spare = json.loads(told.stdout)
    np.testing.assert_allclose(scores, Scorer.load(artifact).score(rows), atol=1e-6)
    assert spare == []


def test_training_there_is_one_line_that_says_what_is_missing(python):
    hetegen = python.with_name("hetegen")
    told = subprocess.run([hetegen, "pretrain"], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    missing = "hetegen_rec needs packages that are not installed: torchrec, fbgemm"
    assert told.stderr.startswith(f"error: {missing}")
    assert "Traceback" not in told.stderr
