"""What scoring by an artifact raises."""


class ArtifactError(ValueError):
    """An artifact cannot be used. The message names the place, what was found, and what to do."""
