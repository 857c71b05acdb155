"""The pinned files: exact, whole, and in agreement with each other and with the check on import."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DIRECTORY = Path(__file__).parents[2] / "requirements"
FILES = ("common.txt", "cpu.txt", "cuda.txt", "serve.txt", "dev.txt")


def requirements(file: str) -> dict[str, Requirement]:
    """The requirements of one file, without those of the files that it includes."""
    lines = [line.partition("#")[0].strip() for line in (DIRECTORY / file).read_text().splitlines()]
    parsed = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def pins(file: str) -> dict[str, str]:
    return {name: str(requirement.specifier) for name, requirement in requirements(file).items()}


@pytest.mark.parametrize("file", FILES)
def test_every_requirement_is_pinned_exactly(file):
    loose = [str(r) for r in requirements(file).values() if not re.fullmatch(r"==[^*,]+", str(r.specifier))]
    assert loose == []


def test_no_package_is_pinned_in_two_files_of_one_installation():
    for accelerator in ("cpu.txt", "cuda.txt"):
        files = ("common.txt", accelerator, "serve.txt", "dev.txt")
        names = [name for file in files for name in requirements(file)]
        assert sorted(names) == sorted(set(names))


def test_cpu_and_cuda_differ_by_the_build_only():
    cpu, cuda = pins("cpu.txt"), pins("cuda.txt")
    assert cpu["torch"] == cuda["torch"]
    assert cpu["fbgemm-gpu-cpu"] == cuda["fbgemm-gpu"] == pins("common.txt")["torchrec"]
    assert "fbgemm-gpu" not in cpu
    assert "fbgemm-gpu-cpu" not in cuda


def test_scoring_takes_versions_of_the_whole_stack():
    stack = pins("common.txt") | pins("cpu.txt")
    found = pins("scoring.txt")
    assert found == {name: stack.get(name) for name in found}
    assert not {"torchrec", "fbgemm-gpu-cpu", "torchx"} & set(found)


def test_only_the_cpu_file_asks_pytorchs_own_index():
    users = [file for file in FILES if "--extra-index-url" in (DIRECTORY / file).read_text()]
    assert users == ["cpu.txt"]


def needs_of(name: str) -> list[Requirement]:
    """What an installed package declares to need here, extras left out; nothing if it is not installed."""
    try:
        declared = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # Pinned for another Python version or accelerator.
        return []
    needs = [Requirement(text) for text in declared]
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def test_pins_leave_nothing_out_that_a_package_needs():
    pinned = {name: pin for file in FILES if file != "cuda.txt" for name, pin in pins(file).items()}
    unmet = []
    for name in sorted(pinned):
        for need in needs_of(name):
            other = canonicalize_name(need.name)
            if other == "fbgemm-gpu" or other.startswith(("nvidia-", "cuda-", "triton")):
                continue  # torchrec's CUDA fbgemm is replaced by the CPU build; CUDA is in cuda.txt.
            version = pinned.get(other, "").removeprefix("==")
            if not version or not need.specifier.contains(version, prereleases=True):
                unmet.append(f"{name} needs {need}, pinned: {version or 'nothing'}")
    assert unmet == []
