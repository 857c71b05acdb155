"""A small trained run, exported with every graph that its fields can have."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_once import made_once
from numpy.typing import NDArray
from tiny_run import tiny_values, write_config

from hetegen_rec.cli import main
from hetegen_rec.scoring.scorer import Scorer

SHARED = ("user_id", "segment", "history")
"""The last on a table of the candidates' side; none of the user's side is on the widest tables."""
STRATEGIES = ("uncertainty", "feature_paths")
OOV_DROPOUT = 2.0
_DIMS = {"segment": 4, "price": 4, "tags": 16}
_SETTINGS = (
    "stages.joint.epochs=1",
    "stages.joint.table_lr=0.2",  # so that rows differ in their scores
    f"stages.joint.oov_dropout={OOV_DROPOUT}",
    "inference.feature_paths.sketch_mb=1",
    "inference.uncertainty.paths=4",
)


@dataclass(frozen=True)
class RichRun:
    """A run with a trained and exported `joint` stage."""

    directory: Path
    _evaluated: dict[tuple[str, str], NDArray[np.float32]] = field(default_factory=dict)

    def hetegen(self, verb: str, *arguments: str) -> int:
        """Runs a verb; returns the exit code."""
        return main([verb, "--config", str(self.directory / "config.yaml"), *_SETTINGS, *arguments])

    def scorer(self, **options: Any) -> Scorer:
        """A scorer of the artifact."""
        return Scorer.load(self.directory / "artifact", **options)

    def raw(self, split: str) -> pa.Table:
        """The raw rows of a split."""
        return pq.read_table(self.directory / "raw" / split)

    def evaluated(self, split: str, strategy: str) -> NDArray[np.float32]:
        """Scores of a split's rows, in order, as `evaluate` writes them."""
        if (split, strategy) not in self._evaluated:
            assert self.hetegen("evaluate", "--stage", "joint", f"inference.strategy={strategy}") == 0
            found = pq.read_table(self.directory / "run" / "joint" / "predictions" / split).sort_by("row_id")
            self._evaluated[split, strategy] = found["probability"].to_numpy()
        return self._evaluated[split, strategy]


@pytest.fixture(scope="session")
def rich_run(tmp_path_factory: pytest.TempPathFactory) -> RichRun:
    """The run: a copy of the one that all workers have, as evaluating writes into it."""
    directory = tmp_path_factory.mktemp("rich")
    shutil.copytree(made_once(tmp_path_factory, "rich-run", _make), directory, dirs_exist_ok=True)
    _write_config(directory)
    return RichRun(directory)


def _make(directory: Path) -> None:
    run = RichRun(directory)
    _write_config(directory)
    assert run.hetegen("joint") == 0
    wanted = (
        "export.backends=[aten,fbgemm]",
        f"export.strategies=[plain,{','.join(STRATEGIES)}]",
        f"export.shared_fields=[{','.join(SHARED)}]",
        "export.parity_rows=240",
    )
    assert run.hetegen("export", "--output", str(directory / "artifact"), *wanted) == 0


def _write_config(directory: Path) -> None:
    values = tiny_values(directory)
    fields = values["features"]["fields"]
    values["features"]["fields"] = [
        {**one, **({"dim": _DIMS[one["name"]]} if one["name"] in _DIMS else {})} for one in fields
    ]
    write_config(directory, values)
