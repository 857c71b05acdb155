"""What `make setup` says when it cannot build the environment, tried on made-up interpreters."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without an environment."""
    shutil.copy(CHECKOUT / "Makefile", tmp_path)
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    shutil.copytree(CHECKOUT / "requirements", tmp_path / "requirements")
    return tmp_path


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Variables of an outer `make test` would reach this one.
    outer = ("MAKE", "MFLAGS", "ACCELERATOR", "PYTHON")
    env = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=env, capture_output=True, text=True, timeout=60, check=False
    )


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_no_suitable_python_is_a_clear_error(checkout):
    old = script(checkout / "python3.9", "exit 1")
    result = make(checkout, "setup", f"PYTHON=/nowhere/python3 {old}")
    assert result.returncode != 0
    assert "no Python 3.10, 3.11 or 3.12 among: /nowhere/python3" in result.stderr
    assert "make PYTHON=" in result.stderr
    assert not (checkout / ".venv").exists()


def test_python_without_venv_is_a_clear_error(checkout):
    bare = script(checkout / "python3.11", 'case "$2" in *ensurepip*) exit 1;; esac')
    result = make(checkout, "setup", f"PYTHON={bare}")
    assert result.returncode != 0
    assert "apt install python3.11-venv" in result.stderr


def test_unknown_accelerator_is_a_clear_error(checkout):
    result = make(checkout, "setup", "ACCELERATOR=tpu")
    assert result.returncode != 0
    assert "ACCELERATOR=tpu is not known; use cpu or cuda" in result.stderr


@pytest.fixture
def installed(checkout: Path) -> Path:
    """A checkout whose environment records the installations asked of pip, instead of doing them."""
    programs = checkout / ".venv" / "bin"
    programs.mkdir(parents=True)
    fake = f'echo "$@" >> {checkout}/calls\ncase "$2" in *version_info*) exec {sys.executable} "$@";; esac'
    script(programs / "python", fake)
    return checkout


def installations(checkout: Path) -> list[str]:
    calls = checkout / "calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return [line.split("--no-deps ")[1] for line in lines if "--no-deps" in line]


def test_setup_asks_the_extra_index_for_torch_and_fbgemm_only(installed):
    assert make(installed, "setup").returncode == 0
    first, second, package = installations(installed)
    assert first == "-r requirements/common.txt"
    assert second.endswith("-r requirements/cpu.txt")
    assert "--retries 1" in second
    assert package.endswith("-e .")


def test_second_setup_does_nothing_and_changed_pins_are_installed(installed):
    make(installed, "setup")
    installations(installed)
    assert make(installed, "setup").returncode == 0
    assert installations(installed) == []
    later = (installed / ".venv" / ".package").stat().st_mtime + 10
    os.utime(installed / "requirements" / "common.txt", (later, later))
    make(installed, "setup")
    assert "-r requirements/common.txt" in installations(installed)


def test_other_accelerator_starts_a_new_environment(installed):
    make(installed, "setup")
    fresh = script(installed / "python3.11", f'echo "$@" >> {installed}/calls')
    make(installed, "setup", "ACCELERATOR=cuda", f"PYTHON={fresh}")
    assert "-m venv --clear .venv" in (installed / "calls").read_text()


@pytest.mark.parametrize("quick", [[], ["QUICK=1"]])
def test_evidence_looks_for_data_where_it_is_told(checkout, quick):
    default = make(checkout, "--dry-run", "evidence", *quick)
    assert "--data-root ../shared/data benchmarks/evidence" in default.stdout
    told = make(checkout, "--dry-run", "evidence", "DATA_ROOT=logs", *quick)
    assert "--data-root logs benchmarks/evidence" in told.stdout


def test_clean_keeps_data_and_runs(installed):
    for directory in ("data", "runs"):
        (installed / directory).mkdir()
    assert make(installed, "clean").returncode == 0
    assert not (installed / ".venv").exists()
    assert (installed / "data").is_dir()
    assert (installed / "runs").is_dir()
