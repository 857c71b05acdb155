"""An artifact with a compiled network; it takes the better part of a minute, so it is made once."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from made_once import made_once
from tiny_artifact import write_tiny_artifact

from hetegen_rec.scoring.manifest import MANIFEST
from hetegen_rec.sealing import sealed, unsealed


@dataclass(frozen=True)
class Compiled:
    """The artifact, and what making it left behind."""

    root: Path
    left_over: list[str]
    """Temporary files."""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Back ends aten and aoti, int8 rows in tables of two widths; no test may change it."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler on this machine")
    place = made_once(tmp_path_factory, "compiled", _compile)
    return Compiled(
        place / "artifact", [path.name for path in (place / "temporary").rglob("*") if path.is_file()]
    )


def _compile(place: Path) -> None:
    (place / "temporary").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(place / "temporary"))
        write_tiny_artifact(place / "artifact", precision="int8", backends=("aten", "aoti"))


def doctored(compiled: Compiled, place: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose manifest was changed by someone who knows how to seal."""
    root = Path(shutil.copytree(compiled.root, place / "doctored"))
    manifest = unsealed((root / MANIFEST).read_text())
    change(manifest)
    (root / MANIFEST).write_text(sealed(manifest))
    return root
