"""The check of the torch, torchrec and fbgemm triple, on made-up installations."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from hetegen_rec._stack import Stack, StackError, check_stack, installed_stack

CPU = Stack("2.13.0+cpu", "CPU", "1.8.0", None, "1.8.0")
CUDA = Stack("2.13.0", "CUDA", "1.8.0", "1.8.0", None)


@pytest.mark.parametrize("stack", [CPU, CUDA, Stack("2.13.1+cpu", "CPU", "1.8.0", None, "1.8.0+cpu")])
def test_triples_that_belong_together_pass(stack):
    check_stack(stack)


def test_this_environment_passes():
    check_stack(installed_stack())


@pytest.mark.parametrize(
    ("stack", "problem"),
    [
        (Stack(None, "unknown", "1.8.0", None, "1.8.0"), "not installed: torch"),
        (Stack(None, "unknown", None, None, None), "not installed: torch, torchrec, fbgemm"),
        (Stack("2.13.0+cpu", "CPU", "1.8.0", None, None), "not installed: fbgemm"),
        (Stack("2.12.1+cpu", "CPU", "1.8.0", None, "1.8.0"), "belong together"),
        (Stack("2.131.0", "CPU", "1.8.0", None, "1.8.0"), "belong together"),
        (Stack("2.13.0+cpu", "CPU", "1.7.0", None, "1.8.0"), "belong together"),
        (Stack("2.13.0+cpu", "CPU", "1.8.0", None, "1.9.0"), "belong together"),
        (Stack("2.13.0+cpu", "CPU", "1.8.0", "1.8.0", None), "does not load on a CPU build"),
        (Stack("2.13.0", "CUDA", "1.8.0", None, "1.8.0"), "no kernels for a CUDA build"),
        (Stack("2.13.0", "CUDA", "1.8.0", "1.8.0", "1.8.0"), "overwrite each other"),
    ],
)
def test_mixtures_are_one_error_that_says_what_to_install(stack, problem):
    with pytest.raises(StackError) as caught:
        check_stack(stack)
    message = str(caught.value)
    assert problem in message
    for found in (stack.torch, stack.torchrec, stack.fbgemm_gpu, stack.fbgemm_gpu_cpu):
        assert found is None or found in message
    assert "pip install --no-deps torch==2.13.0 torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0" in message
    assert "pip install --no-deps torch==2.13.0 torchrec==1.8.0 fbgemm-gpu==1.8.0" in message
    for stale, found in (("fbgemm-gpu", stack.fbgemm_gpu), ("fbgemm-gpu-cpu", stack.fbgemm_gpu_cpu)):
        uninstalled = message.partition("pip uninstall -y torch ")[2].partition(" &&")[0].split()
        assert (stale in uninstalled) == (found is not None)


@pytest.mark.parametrize(
    ("line", "build"),
    [
        ("cuda: Optional[str] = None", "CPU"),
        ("cuda: Optional[str] = '13.0'", "CUDA"),
        ("cuda = '12.9'", "CUDA"),
        ("cuda = None", "CPU"),
    ],
)
def test_build_of_torch_is_read_without_importing_it(tmp_path: Path, line, build):
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip: Optional[str] = None\n")
    versions = {"torch": "2.13.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    stack = installed_stack(version, lambda name: tmp_path)
    assert stack == Stack("2.13.0", build, None, None, None)


def test_build_is_unknown_where_torch_does_not_say(tmp_path: Path):
    stack = installed_stack(lambda name: "1.8.0", lambda name: tmp_path)
    assert stack.torch_build == "unknown"


def test_checking_imports_neither_torch_nor_torchrec():
    code = "import sys, hetegen_rec; sys.exit(bool({'torch', 'torchrec', 'fbgemm_gpu'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
