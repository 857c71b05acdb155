"""What makes a run the one that it is: digests of all that decides about its results."""

import hashlib
import json
from collections.abc import Collection
from typing import Any

from hetegen_rec.config.run import RunConfig, Stage

_PLACES = ("train", "valid", "test", "raw_dir", "prepared_dir")


def decisive(config: RunConfig, stages: Collection[Stage]) -> dict[str, Any]:
    """What of a configuration decides about the results: no places, no stages that the run has not."""
    values = config.model_dump(
        mode="json",
        exclude={"name": True, "run_dir": True, "checkpoints": True, "data": set(_PLACES)},
        exclude_defaults=True,  # so that a new key of the configuration makes no new run
    )
    used = {stage: section for stage, section in values.get("stages", {}).items() if stage in stages}
    return {**values, "stages": used}


def digest(content: object) -> str:
    """A short name for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
