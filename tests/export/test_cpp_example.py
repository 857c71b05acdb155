"""examples/cpp: a program without Python that scores as Python does."""

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiled_artifact import doctored
from numpy.typing import NDArray
from tiny_artifact import raw_rows

from hetegen_rec.scoring.manifest import MANIFEST
from hetegen_rec.scoring.scorer import Scorer

SOURCES = Path(__file__).parents[2] / "examples" / "cpp"
NUM_ROWS = 5000
"""More than the program scores at once."""


@dataclass(frozen=True)
class Program:
    """The program, built."""

    path: Path

    def run(self, root: Path, ids: Path, output: Path) -> "subprocess.CompletedProcess[str]":
        """Scores; it prints nothing but errors."""
        command = [self.path, root, ids, output]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Program:
    """Built as CMakeLists.txt says, but with less optimisation, which takes less time."""
    missing = [tool for tool in ("cmake", "ninja", "g++") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not on this machine: {', '.join(missing)}")
    build = tmp_path_factory.mktemp("build")
    options = [f"CMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", "CMAKE_CXX_FLAGS=-O1 -Werror"]
    configure = ["cmake", "-S", SOURCES, "-B", build, "-G", "Ninja", *(f"-D{option}" for option in options)]
    for command in (configure, ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return Program(build / "score")


@pytest.fixture(scope="module")
def ids(compiled) -> NDArray[np.int64]:
    return Scorer.load(compiled.root).ids(raw_rows(NUM_ROWS))


@pytest.fixture
def ids_path(ids, tmp_path) -> Path:
    np.save(tmp_path / "ids.npy", ids)
    return tmp_path / "ids.npy"


@pytest.mark.parametrize("num_rows", [0, 1, NUM_ROWS])
def test_scores_equal_those_of_python(num_rows, program, compiled, ids, tmp_path):
    np.save(tmp_path / "ids.npy", ids[:num_rows])
    done = program.run(compiled.root, tmp_path / "ids.npy", tmp_path / "scores.npy")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = np.load(tmp_path / "scores.npy")
    expected = Scorer.load(compiled.root, backend="aoti").score_ids(ids[:num_rows])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_reads_whatever_else_a_manifest_says(program, compiled, ids, ids_path, tmp_path):
    def odd(manifest: dict[str, Any]) -> None:
        manifest["metrics"] = {
            'a "quoted" \\ name\n': [],
            "é 漢 😀": {},
            "numbers": [float("nan"), float("-inf"), -1.5e-7, 0, 1e300],
            "words": [True, False, None],
        }
        name = 'user "é 😀"'
        manifest["features"]["fields"][0]["name"] = name
        for group in manifest["tables"]:
            first_rows = group["first_rows"]
            group["first_rows"] = {name if key == "user_id" else key: row for key, row in first_rows.items()}

    root = doctored(compiled, tmp_path, odd)
    done = program.run(root, ids_path, tmp_path / "scores.npy")
    assert done.returncode == 0, done.stderr
    expected = Scorer.load(compiled.root, backend="aoti").score_ids(ids)
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), expected, atol=1e-6, rtol=0)


def _foreign(manifest: dict[str, Any]) -> None:
    manifest["backends"]["aoti"]["hardware"]["extensions"].append("avx1024")


def _future(manifest: dict[str, Any]) -> None:
    manifest["format_version"] = 99


def _other_torch(manifest: dict[str, Any]) -> None:
    manifest["backends"]["aoti"]["libraries"]["torch"] = "2.1.0"


def _portable_only(manifest: dict[str, Any]) -> None:
    del manifest["backends"]["aoti"]


MANIFESTS = {
    "another processor": (_foreign, "compiled for a processor with avx1024"),
    "another format": (_future, "another format than 1"),
    "another libtorch": (_other_torch, "compiled with torch 2.1.0"),
    "no compiled network": (_portable_only, "no member 'aoti'"),
}


def refused(done: "subprocess.CompletedProcess[str]", told: str) -> None:
    """One line of error, and the exit code of a wrong use."""
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert told in done.stderr


@pytest.mark.parametrize(("change", "told"), MANIFESTS.values(), ids=list(MANIFESTS))
def test_refuses_an_artifact_that_cannot_run_here(
    change: Callable[[dict[str, Any]], None], told: str, program, compiled, ids_path, tmp_path
):
    root = doctored(compiled, tmp_path, change)
    refused(program.run(root, ids_path, tmp_path / "scores.npy"), told)
    assert not (tmp_path / "scores.npy").exists()


DAMAGED = {
    "a manifest that is cut off": (MANIFEST, "JSON: no "),
    "a table that is cut off": ("tables/8_values.npy", "cut off"),
}


@pytest.mark.parametrize(("name", "told"), DAMAGED.values(), ids=list(DAMAGED))
def test_refuses_a_file_that_is_cut_off(name, told, program, compiled, ids_path, tmp_path):
    root = Path(shutil.copytree(compiled.root, tmp_path / "damaged"))
    (root / name).write_bytes((root / name).read_bytes()[:-20])
    refused(program.run(root, ids_path, tmp_path / "scores.npy"), told)


INPUTS = {
    "too few slots": (np.zeros((3, 2), np.int64), "not int64 [rows, "),
    "one row without its batch": (np.zeros(7, np.int64), "not int64 [rows, "),
    "numbers of another type": (np.zeros((3, 11), np.float32), "not int64 [rows, "),
    "numbers that no artifact has": (np.zeros((3, 11), np.complex64), "not numbers that artifacts use"),
}


@pytest.mark.parametrize(("array", "told"), INPUTS.values(), ids=list(INPUTS))
def test_refuses_ids_of_another_form(array, told, program, compiled, tmp_path):
    np.save(tmp_path / "ids.npy", array)
    refused(program.run(compiled.root, tmp_path / "ids.npy", tmp_path / "scores.npy"), told)


def test_refuses_paths_that_lead_nowhere(program, compiled, ids_path, tmp_path):
    refused(program.run(tmp_path, ids_path, tmp_path / "scores.npy"), "manifest.json: cannot be read")
    refused(program.run(compiled.root, tmp_path / "absent.npy", tmp_path / "s.npy"), "absent.npy: cannot")
    refused(program.run(compiled.root, ids_path, tmp_path / "no" / "s.npy"), "s.npy: cannot be written")
