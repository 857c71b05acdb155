"""A model repository of NVIDIA's Triton Inference Server around an artifact.

The model is one of Triton's Python back end. Its PyTorch back end takes AOTInductor packages since release
26.03, but as a beta without batches of more than one request, and every argument of a graph would have to
come with each request: also the embedding tables.
"""

import re
import shutil
from pathlib import Path

from hetegen_rec.files import write_whole
from hetegen_rec.scoring.manifest import Artifact
from hetegen_rec.scoring.scorer import ROWS_AT_ONCE
from hetegen_rec.scoring.triton import ARTIFACT, PROBABILITY, ROW

_CONFIG = f"""\
# The name of the model is that of this directory. `hetegen export --triton` leaves this file as it is.
backend: "python"
max_batch_size: {ROWS_AT_ONCE}
input [
  {{
    name: "{ROW}"
    data_type: TYPE_STRING
    dims: [ 1 ]
  }}
]
output [
  {{
    name: "{PROBABILITY}"
    data_type: TYPE_FP32
    dims: [ 1 ]
  }}
]
# Requests that wait are scored together, and none waits longer than this for others to come.
dynamic_batching {{
  max_queue_delay_microseconds: 2000
}}
# An instance is a process; all of them share the pages of the embedding tables.
instance_group [
  {{
    count: 1
    kind: KIND_CPU
  }}
]
"""
_MODEL = """\
from hetegen_rec.scoring.triton import TritonPythonModel

__all__ = ["TritonPythonModel"]
"""


def add_to_repository(repository: Path, artifact: Artifact) -> Path:
    r"""Puts an artifact into a model repository, as the next version of the model of its run's name.

    The version appears whole or not at all. A `config.pbtxt` that is there stays, as operators tune it.

    Args:
        repository: may exist, with this and other models.
        artifact: to copy; leading dots of its run's name, and what is not a letter, digit, `_`, `.` or `-`,
            becomes `_`.

    Returns:
        Directory of the version.
    """
    model = repository / re.sub(r"^\.+|[^\w.-]", "_", artifact.manifest.name, flags=re.ASCII)
    model.mkdir(parents=True, exist_ok=True)
    if not (model / "config.pbtxt").exists():
        write_whole(model / "config.pbtxt", _CONFIG)
    version = model / str(_next_version(model))
    partial = model / f".{version.name}.partial"  # Triton takes numbers for versions, and ignores the rest
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(artifact.root, partial / ARTIFACT)
        (partial / "model.py").write_text(_MODEL, encoding="utf-8")
        partial.rename(version)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return version


def _next_version(model: Path) -> int:
    taken = [int(path.name) for path in model.iterdir() if path.name.isascii() and path.name.isdigit()]
    return max(taken, default=0) + 1
