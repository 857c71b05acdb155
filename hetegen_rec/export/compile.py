"""The graph of a network, written as each back end takes it."""

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from hetegen_rec.config.export import Backend
from hetegen_rec.export.graph import ScoringGraph
from hetegen_rec.scoring.hardware import this_hardware
from hetegen_rec.scoring.manifest import BackendEntry

DIRECTORY = "network"
_EXAMPLE_ROWS = 8
_MOST_ROWS = 1 << 30


def compile_graph(graph: ScoringGraph, tables: list[Tensor], backend: Backend, root: Path) -> BackendEntry:
    """Writes a graph for one back end.

    The number of rows of a call is free, and so is that of the tables' rows, which may grow.

    Args:
        graph: to write.
        tables: its arguments behind the ids.
        backend: which one.
        root: directory of the artifact.

    Returns:
        Its entry of the manifest.
    """
    (root / DIRECTORY).mkdir(exist_ok=True)
    name = f"{DIRECTORY}/{backend}.pt2"
    return _WRITERS[backend](_program(graph, tables), root, name)


def _program(graph: ScoringGraph, tables: list[Tensor]) -> ExportedProgram:
    num_slots = graph.num_slots
    ids = torch.zeros(_EXAMPLE_ROWS, num_slots, dtype=torch.int64)
    # The first argument of each group says where tables begin; only the others have a row per table row.
    table_shapes = [None if table.dtype == torch.int64 else {0: Dim.DYNAMIC} for table in tables]
    shapes = ({0: Dim("rows", min=1, max=_MOST_ROWS)}, table_shapes)
    with torch.no_grad():
        return torch.export.export(graph, (ids, tables), dynamic_shapes=shapes, strict=False)


def _write_aten(program: ExportedProgram, root: Path, name: str) -> BackendEntry:
    program.example_inputs = None  # they would be stored as a pickle
    torch.export.save(program, root / name)
    return BackendEntry(file=name, libraries=_versions("torch"))


def _write_aoti(program: ExportedProgram, root: Path, name: str) -> BackendEntry:
    torch._inductor.aoti_compile_and_package(program, package_path=str(root / name))
    return BackendEntry(file=name, libraries=_versions("torch"), hardware=this_hardware())


def _versions(*libraries: str) -> dict[str, str]:
    return {library: metadata.version(library) for library in libraries}


_WRITERS: Mapping[Backend, Callable[[ExportedProgram, Path, str], BackendEntry]] = MappingProxyType(
    {"aten": _write_aten, "aoti": _write_aoti}
)
