"""The graph of a network, written as each back end takes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import fbgemm_gpu
import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.utils import fresh_cache
from torch.export import Dim, ExportedProgram

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.export import Backend, TablePrecision
from hetegen_rec.export.fbgemm import fused_encoder
from hetegen_rec.export.graph import ScoringGraph
from hetegen_rec.scoring.hardware import this_hardware
from hetegen_rec.scoring.manifest import BackendEntry, PartName
from hetegen_rec.scoring.precision import CODINGS, FUSED, stored_parts
from hetegen_rec.scoring.tables import Encode

DIRECTORY = "network"
EXAMPLE_ROWS = 8
ROWS = Dim("rows", min=1, max=1 << 30)
"""The free size of all arguments and results with a row per row."""
_INDUCTOR_OPTIONS: Mapping[str, bool] = MappingProxyType(
    {
        # Otherwise as many threads as this process has now are compiled in, wherever the package runs.
        "cpp.dynamic_threads": True,
        # They pay where one compiles often, take as long as the network, and stay behind in /tmp.
        "aot_inductor.precompile_headers": False,
    }
)


@dataclass(frozen=True)
class Part:
    """A graph that stands beside the plain one, and how it is called."""

    graph: nn.Module
    arguments: tuple[Any, ...]
    """As in a call."""
    shapes: tuple[Any, ...]
    """Which of their sizes are free, as `torch.export` takes it."""


def compile_graph(graph: ScoringGraph, tables: list[Tensor], backend: Backend, root: Path) -> BackendEntry:
    """Writes a graph for one back end.

    The number of rows of a call is free, and so is that of the tables' rows, which may grow.

    Args:
        graph: to write, with the lookup of that back end.
        tables: its arguments behind the ids, as that back end takes them.
        backend: which one.
        root: directory of the artifact.

    Returns:
        Its entry of the manifest.
    """
    (root / DIRECTORY).mkdir(exist_ok=True)
    name = f"{DIRECTORY}/{backend}.pt2"
    ids = torch.zeros(EXAMPLE_ROWS, graph.layout.num_slots, dtype=torch.int64)
    part = Part(graph, (ids, tables), ({0: ROWS}, free_sizes(tables)))
    return _WRITERS[backend](_program(part), root, name)


def compile_part(part: Part, name: PartName, backend: Backend, root: Path) -> str:
    """Writes another graph of a back end that `compile_graph` wrote; returns its file."""
    file = f"{DIRECTORY}/{backend}_{name}.pt2"
    _WRITERS[backend](_program(part), root, file)
    return file


def free_sizes(tables: list[Tensor]) -> list[Any]:
    """Which sizes of a graph's tables are free."""
    # The first argument of each group says where tables begin; only the others have a row per table row.
    return [None if table.dtype == torch.int64 else {0: Dim.DYNAMIC} for table in tables]


def require_compilers(backends: Sequence[Backend]) -> None:
    """Refuses back ends that cannot be made on this machine, before any work is done for them.

    Raises:
        ConfigError: `aoti` is wanted, and there is no C++ compiler.
    """
    if "aoti" not in backends:
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "`export.backends` names aoti, which is compiled as C++, but no compiler was found: install g++, "
            "or name one in the environment variable CXX, or leave aoti out"
        ) from error


def row_encoder(precision: TablePrecision, backends: Sequence[Backend], dims: Mapping[str, int]) -> Encode:
    """What stores table rows for all of some back ends.

    Args:
        precision: of the rows.
        backends: that will read them.
        dims: width of each table.

    Raises:
        ConfigError: a back end has no such rows of such a width.
    """
    parts = {part for backend in backends for part in stored_parts(precision, backend)}
    encoders = [CODINGS[precision].encode] if parts & set(CODINGS[precision].names) else []
    if FUSED in parts:
        encoders.append(fused_encoder(precision, dims))
    return lambda rows: {name: part for encode in encoders for name, part in encode(rows).items()}


def _program(part: Part) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(part.graph, part.arguments, dynamic_shapes=part.shapes, strict=False)


def _write_aten(program: ExportedProgram, root: Path, name: str) -> BackendEntry:
    _save(program, root / name)
    return BackendEntry(file=name, libraries=_versions("torch"))


def _write_fbgemm(program: ExportedProgram, root: Path, name: str) -> BackendEntry:
    _save(program, root / name)
    return BackendEntry(file=name, libraries={**_versions("torch"), "fbgemm_gpu": fbgemm_gpu.__version__})


def _save(program: ExportedProgram, path: Path) -> None:
    program.example_inputs = None  # they would be stored as a pickle
    torch.export.save(program, path)


def _write_aoti(program: ExportedProgram, root: Path, name: str) -> BackendEntry:
    # Torch would keep what it compiles in a directory of the user's, for those who compile the same again.
    with fresh_cache(), torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(root / name), inductor_configs=dict(_INDUCTOR_OPTIONS)
        )
    return BackendEntry(file=name, libraries=_versions("torch"), hardware=this_hardware())


def _versions(*libraries: str) -> dict[str, str]:
    return {library: metadata.version(library) for library in libraries}


_WRITERS: Mapping[Backend, Callable[[ExportedProgram, Path, str], BackendEntry]] = MappingProxyType(
    {"aten": _write_aten, "aoti": _write_aoti, "fbgemm": _write_fbgemm}
)
