"""A run over a small generated click log, for tests that go from raw files to scores."""

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from hetegen_rec.config.loading import load_config
from hetegen_rec.config.run import RunConfig

FIELDS: list[dict[str, Any]] = [
    {"name": "user_id", "kind": "id", "min_count": 2},
    {"name": "item_id", "kind": "id", "min_count": 2},
    {"name": "segment", "kind": "categorical"},
    {"name": "intent", "kind": "categorical"},
    {"name": "tags", "kind": "multi_valued", "max_length": 3},
    {"name": "price", "kind": "numeric", "num_buckets": 8},
    {"name": "history", "kind": "sequence", "table": "item_id", "max_length": 3},
]


def tiny_values(directory: Path) -> dict[str, Any]:
    """The content of a configuration file; everything is written below `directory`."""
    return {
        "name": "tiny",
        "run_dir": str(directory / "run"),
        "data": {
            "source": {"name": "synthetic", "rows": 3000, "id_cardinality": 300},
            "raw_dir": str(directory / "raw"),
            "prepared_dir": str(directory / "prepared"),
        },
        "features": {
            "label": "label",
            "timestamp": "timestamp",
            "user": "user_id",
            "item": "item_id",
            "fields": FIELDS,
        },
        "model": {"dim": 8, "denoiser": {"num_layers": 1}, "ctr": {"hidden": [16]}},
        "train": {"batch_size": 240, "eval_batch_size": 240, "log_every": 1, "tensorboard": False},
    }


def write_tiny(directory: Path) -> Path:
    """Writes the configuration file; returns its path."""
    return write_config(directory, tiny_values(directory))


def write_config(directory: Path, values: dict[str, Any]) -> Path:
    """Writes any configuration as `config.yaml`; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def tiny_config(directory: Path, *overrides: str) -> RunConfig:
    """The same configuration with overrides, loaded; ranks may call it at the same time."""
    with TemporaryDirectory() as place:
        return load_config(write_config(Path(place), tiny_values(directory)), overrides)


def files_below(directory: Path) -> dict[str, str]:
    """Every file below a directory with a digest of its content, to see whether anything changed."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
