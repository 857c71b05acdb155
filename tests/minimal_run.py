"""The smallest configuration of a run, for tests of what its sections may say."""

from typing import Any

from hetegen_rec.config.loading import parse_config
from hetegen_rec.config.run import RunConfig


def minimal_run(**sections: dict[str, Any]) -> RunConfig:
    """A run with one field; what is given of a section is added to it, or stands in its place."""
    values: dict[str, Any] = {
        "name": "demo",
        "run_dir": "runs/demo",
        "data": {"train": "t.parquet", "valid": "v.parquet", "prepared_dir": "data/demo"},
        "features": {"label": "click", "fields": [{"name": "user", "kind": "id"}]},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return parse_config(values, "test")
