"""The back ends of an artifact: its network as a function of ids and tables, in three forms."""

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hetegen_rec.config.export import Backend
from hetegen_rec.scoring.archives import refuse_pickles
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.scoring.hardware import this_hardware
from hetegen_rec.scoring.manifest import Artifact, BackendEntry, PartName

Graph: TypeAlias = Callable[[Tensor, list[Tensor]], Tensor]
"""ids [B, S] int64 and tables -> [B] float32 probabilities."""

_PREFERENCE: tuple[Backend, ...] = ("aoti", "fbgemm", "aten")
"""Fast ones first."""
_PACKAGE_OPTIONS = ("model", False, 1, -1)
"""Name within the package, whether to do without locks, copies for calls at a time, device: the CPU."""
_WANTED_BY: Mapping[PartName, str] = MappingProxyType(
    {
        "tokens": "name the strategies in `export.strategies`",
        "logits": "name the strategies in `export.strategies`",
        "candidates": "name the user's fields in `export.shared_fields`",
        "integers": "set `export.raw_integers: true`",
    }
)


def choose_backend(artifact: Artifact, wanted: Backend | None) -> Backend:
    """The back end to score by: the wanted one, or the fastest that can run here.

    Raises:
        ArtifactError: the artifact does not have it, or none of its back ends can run here.
    """
    entries = artifact.manifest.backends
    if wanted is not None:
        if wanted not in entries:
            raise ArtifactError(
                f"{artifact.root}: no back end {wanted!r}; it has {', '.join(entries)}. Export it with "
                f"`export.backends=[{wanted}]`"
            )
        problem = _problem(entries[wanted])
        if problem is not None:
            raise ArtifactError(f"{artifact.root}: back end {wanted} cannot run here: {problem}")
        return wanted
    problems = []
    for name in _PREFERENCE:
        if name in entries:
            problem = _problem(entries[name])
            if problem is None:
                return name
            problems.append(f"{name}: {problem}")
    raise ArtifactError(f"{artifact.root}: no back end can run here: {'; '.join(problems)}")


def load_graph(artifact: Artifact, name: Backend) -> Graph:
    """Loads a back end that `choose_backend` returned."""
    return _load(artifact, artifact.manifest.backends[name].file, name)


def load_part(artifact: Artifact, backend: Backend, name: PartName) -> Callable[..., Any]:
    """Loads another graph of a back end that `choose_backend` returned (see `PartName`).

    Raises:
        ArtifactError: the artifact does not have it.
    """
    file = artifact.manifest.backends[backend].parts.get(name)
    if file is None:
        raise ArtifactError(f"{artifact.root}: no graph {name!r}; {_WANTED_BY[name]} and export it again")
    return _load(artifact, file, backend)


def _load(artifact: Artifact, file: str, backend: Backend) -> Callable[..., Any]:
    path = str(artifact.path(file))
    if backend == "aoti":
        return _load_package(path)
    if backend == "fbgemm":
        importlib.import_module("fbgemm_gpu")  # registers the operators that the graph calls
    refuse_pickles(artifact.path(file))
    return torch.export.load(path).module()


def _load_package(path: str) -> Callable[..., Any]:
    """A compiled package as a function of tensors, and of lists and tuples of tensors.

    `torch._inductor.aoti_load_package` would compile half a dozen small programs first, to find out what
    this processor can do, which `_problem` has done; and its result parses descriptions of arguments and
    results, JSON, in every call, which takes longer than to score a row. Calls of several threads run one
    after the other: the binding holds Python's lock meanwhile (pytorch#197516).
    """
    loader = torch._C._aoti.AOTIModelPackageLoader(path, *_PACKAGE_OPTIONS)
    _, result = (pytree.treespec_loads(text) for text in loader.get_call_spec())
    return lambda *arguments: pytree.tree_unflatten(loader.boxed_run(pytree.tree_leaves(arguments)), result)


def _problem(entry: BackendEntry) -> str | None:
    """Why a back end cannot run here; None if it can."""
    for library, version in entry.libraries.items():
        found = _version(library)
        if found is None:
            return f"{library} is not installed; install version {version}"
        if entry.hardware is not None and found.split("+")[0] != version.split("+")[0]:
            return f"it was compiled with {library} {version}, but {found} is installed; export it again"
    if entry.hardware is None:
        return None
    missing = entry.hardware.missing_on(this_hardware())
    if missing:
        return (
            f"it was compiled for another processor, with {', '.join(missing)}; export it on a machine like "
            "this one, or use the back end aten"
        )
    return None


def _version(library: str) -> str | None:
    try:
        return str(importlib.import_module(library.replace("-", "_")).__version__)
    except (ImportError, OSError):  # OSError: it is there, but not what it links to
        return None
