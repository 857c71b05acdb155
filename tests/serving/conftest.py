"""What the tests of this room share: artifacts that are made once, and servers within this process."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import InProcess
from one_thread import one_thread  # noqa: F401
from tiny_artifact import write_tiny_artifact


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact; tests leave it as it is."""
    path = tmp_path_factory.mktemp("served") / "artifact"
    write_tiny_artifact(path, seed=1, step=10)
    return path


@pytest.fixture(scope="session")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, with other weights; tests leave it as it is."""
    path = tmp_path_factory.mktemp("newer") / "artifact"
    write_tiny_artifact(path, seed=2, step=20)
    return path


@pytest.fixture
def path(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact, which a test may replace."""
    return Path(shutil.copytree(artifact, tmp_path / "artifact"))


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[InProcess]:
    """A server with the settings that a user gets."""
    with InProcess(artifact) as running:
        yield running
