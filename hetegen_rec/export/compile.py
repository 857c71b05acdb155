"""The graph of a network, written as each back end takes it."""

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

import fbgemm_gpu
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from hetegen_rec.config.export import Backend, TablePrecision
from hetegen_rec.export.fbgemm import fused_encoder
from hetegen_rec.export.graph import ScoringGraph
from hetegen_rec.scoring.hardware import this_hardware
from hetegen_rec.scoring.manifest import BackendEntry
from hetegen_rec.scoring.precision import CODINGS, FUSED, stored_parts
from hetegen_rec.scoring.tables import Encode

DIRECTORY = "network"
_EXAMPLE_ROWS = 8
_MOST_ROWS = 1 << 30


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
    return _WRITERS[backend](_program(graph, tables), root, name)


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


def _program(graph: ScoringGraph, tables: list[Tensor]) -> ExportedProgram:
    num_slots = graph.num_slots
    ids = torch.zeros(_EXAMPLE_ROWS, num_slots, dtype=torch.int64)
    # The first argument of each group says where tables begin; only the others have a row per table row.
    table_shapes = [None if table.dtype == torch.int64 else {0: Dim.DYNAMIC} for table in tables]
    shapes = ({0: Dim("rows", min=1, max=_MOST_ROWS)}, table_shapes)
    with torch.no_grad():
        return torch.export.export(graph, (ids, tables), dynamic_shapes=shapes, strict=False)


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
    torch._inductor.aoti_compile_and_package(program, package_path=str(root / name))
    return BackendEntry(file=name, libraries=_versions("torch"), hardware=this_hardware())


def _versions(*libraries: str) -> dict[str, str]:
    return {library: metadata.version(library) for library in libraries}


_WRITERS: Mapping[Backend, Callable[[ExportedProgram, Path, str], BackendEntry]] = MappingProxyType(
    {"aten": _write_aten, "aoti": _write_aoti, "fbgemm": _write_fbgemm}
)
