"""The one error type of this room."""


class EvaluationError(ValueError):
    """Scores or results cannot be evaluated. The message says what was found, where, and what to do."""
