"""What the tests of this room share."""

from compiled_artifact import compiled  # noqa: F401
from rich_artifact import rich_run  # noqa: F401
