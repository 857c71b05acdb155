"""One artifact of a small untrained model, for all tests of this room; none of them may change it."""

import shutil
from pathlib import Path

import pytest
from tiny_artifact import write_tiny_artifact


@pytest.fixture(scope="session")
def artifact(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("artifacts") / "tiny"
    write_tiny_artifact(path)
    return path


@pytest.fixture
def own_artifact(artifact, tmp_path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(artifact, tmp_path / "own"))
