"""What the operator of a server can choose."""

from dataclasses import dataclass

from hetegen_rec.config.export import ScoringStrategy


@dataclass(frozen=True)
class Settings:
    """Limits and times of a server, and how it scores."""

    strategy: ScoringStrategy = "plain"
    """Test-time strategy, one of the artifact's."""
    max_rows: int = 4096
    """Of one request; one with more is refused."""
    max_bytes: int = 8 << 20
    """Of the body of one request; a longer one is refused before it is read to its end."""
    queue_rows: int = 16_384
    """Rows that may wait to be scored; a request that finds so many is refused at once."""
    batch_rows: int = 512
    """Rows that are scored together; a request with more is scored alone."""
    batch_seconds: float = 0.001
    """How long a request may wait for others to be scored with."""
    deadline_seconds: float = 5.0
    """After which a request that has no scores yet is given up."""
    body_seconds: float = 10.0
    """In which a body must have come."""
    max_connections: int = 1000
    """Open at a time; further ones are refused."""
    watch_seconds: float = 1.0
    """Between two looks at whether another artifact stands at the path; 0: never."""
    drain_seconds: float = 30.0
    """That a server which is told to stop gives to the requests that it has."""
    reload_endpoint: bool = False
    """Whether `POST /v1/reload` exists. The server knows nobody by name, so whoever reaches it may ask; off
    by default, as the watched path and SIGHUP do the same for those who may change the artifact."""
