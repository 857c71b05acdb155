"""The error that a built-in data set raises when it cannot be brought."""


class SourceError(RuntimeError):
    """A built-in data set cannot be brought. The message names the place, the cause and the fix."""
