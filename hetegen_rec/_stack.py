"""The torch / torchrec / fbgemm triple, checked before anything imports it.

The three are built against each other, but none of their wheels says so: a wrong mixture installs
without complaint and fails much later, with an undefined symbol or a missing shared library.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeAlias

Build: TypeAlias = Literal["CPU", "CUDA", "unknown"]

_TORCH_SERIES = "2.13"
_TORCH = f"{_TORCH_SERIES}.0"
_TORCHREC = _FBGEMM = "1.8.0"
_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_CUDA_VERSION = re.compile(r"^cuda\b[^=]*=\s*['\"]", re.MULTILINE)


class StackError(ImportError):
    """The installed torch, torchrec and fbgemm do not fit each other."""


@dataclass(frozen=True)
class Stack:
    """What is installed; a version is None where the package is missing."""

    torch: str | None
    torch_build: Build
    """What torch was built for; `unknown` if it is missing or does not say."""
    torchrec: str | None
    fbgemm_gpu: str | None
    """The CUDA build of fbgemm."""
    fbgemm_gpu_cpu: str | None
    """The CPU build of fbgemm, imported under the same name as the CUDA build."""

    @property
    def is_for_scoring(self) -> bool:
        """Whether there is a torch but neither torchrec nor fbgemm: enough to score by an artifact."""
        others = (self.torchrec, self.fbgemm_gpu, self.fbgemm_gpu_cpu)
        return self.torch is not None and others == (None, None, None)


def installed_stack(
    version: Callable[[str], str] = metadata.version, find_module: Callable[[str], Path | None] | None = None
) -> Stack:
    """Looks the packages up by their metadata, which imports none of them.

    Args:
        version: version of a distribution; raises PackageNotFoundError where there is none.
        find_module: directory of a top-level package, None where there is none.
    """
    names = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")
    torch, torchrec, fbgemm_gpu, fbgemm_gpu_cpu = (_version_or_none(version, name) for name in names)
    build = _torch_build((find_module or _module_dir)("torch")) if torch else "unknown"
    return Stack(torch, build, torchrec, fbgemm_gpu, fbgemm_gpu_cpu)


def check_stack(stack: Stack) -> None:
    """Checks that the installed packages fit each other.

    Raises:
        StackError: they do not; the message names what was found and what to install.
    """
    problem = _problem(stack)
    if problem:
        raise StackError(
            f"{problem}\n"
            f"found:   {_describe(stack)}\n"
            f"needed:  torch {_TORCH_SERIES}.*, torchrec {_TORCHREC} and fbgemm {_FBGEMM}, which fit each "
            "other only as this triple\n"
            f"install: {_remedy(stack)}"
        )


def _problem(stack: Stack) -> str | None:
    """The first thing that is wrong, None if nothing is."""
    fbgemm = stack.fbgemm_gpu or stack.fbgemm_gpu_cpu
    missing = [
        name
        for name, found in (("torch", stack.torch), ("torchrec", stack.torchrec), ("fbgemm", fbgemm))
        if found is None
    ]
    if missing:
        return f"hetegen_rec needs packages that are not installed: {', '.join(missing)}"
    if stack.fbgemm_gpu and stack.fbgemm_gpu_cpu:
        return "fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other's files"
    if (
        not _is_series(stack.torch, _TORCH_SERIES)
        or _public(stack.torchrec) != _TORCHREC
        or _public(fbgemm) != _FBGEMM
    ):
        return "the installed torch, torchrec and fbgemm are not releases that belong together"
    if stack.torch_build == "CPU" and stack.fbgemm_gpu:
        return "fbgemm-gpu, the CUDA build of fbgemm, does not load on a CPU build of torch"
    if stack.torch_build == "CUDA" and stack.fbgemm_gpu_cpu:
        return "fbgemm-gpu-cpu, the CPU build of fbgemm, has no kernels for a CUDA build of torch"
    return None


def _describe(stack: Stack) -> str:
    build = f" ({stack.torch_build} build)" if stack.torch_build != "unknown" else ""
    found = {
        "torch": stack.torch and stack.torch + build,
        "torchrec": stack.torchrec,
        "fbgemm-gpu": stack.fbgemm_gpu,
        "fbgemm-gpu-cpu": stack.fbgemm_gpu_cpu,
    }
    return ", ".join(f"{name} {version}" for name, version in found.items() if version) or "none of them"


def _remedy(stack: Stack) -> str:
    """Commands that put the triple right, for CPU and for CUDA."""
    stale = [
        name
        for name, found in (("fbgemm-gpu", stack.fbgemm_gpu), ("fbgemm-gpu-cpu", stack.fbgemm_gpu_cpu))
        if found
    ]
    # The two fbgemm wheels share their files: removing one after the other came in breaks both.
    cleanup = f"pip uninstall -y torch {' '.join(stale)} && " if stale else ""
    cpu = f"torch=={_TORCH} torchrec=={_TORCHREC} fbgemm-gpu-cpu=={_FBGEMM} --extra-index-url {_CPU_INDEX}"
    cuda = f"torch=={_TORCH} torchrec=={_TORCHREC} fbgemm-gpu=={_FBGEMM}"
    return (
        f"{cleanup}pip install --no-deps {cpu}\n"
        f"         (with CUDA: {cleanup}pip install --no-deps {cuda})\n"
        "         or, in a checkout, `make clean setup`, which brings everything else that they need "
        "(ACCELERATOR=cuda for CUDA)"
    )


def _version_or_none(version: Callable[[str], str], name: str) -> str | None:
    try:
        return version(name)
    except metadata.PackageNotFoundError:
        return None


def _module_dir(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _torch_build(directory: Path | None) -> Build:
    """Reads torch/version.py as text: importing torch takes seconds and may be what fails."""
    if directory is None:
        return "unknown"
    try:
        text = (directory / "version.py").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return "CUDA" if _CUDA_VERSION.search(text) else "CPU"


def _public(version: str | None) -> str | None:
    """A version without its local part: 2.13.0 of 2.13.0+cpu."""
    return version and version.partition("+")[0]


def _is_series(version: str | None, series: str) -> bool:
    return version is not None and f"{_public(version)}.".startswith(f"{series}.")
