"""What data preparation needs of the processes that share its work; implemented by Runtime."""

from typing import Any, Protocol


class Workers(Protocol):
    """The processes of one job, seen from one of them."""

    @property
    def rank(self) -> int:
        """Index of this process, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order of rank, on every rank. A collective."""
        ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. A collective."""
        ...

    def together(self, what: str) -> Any:
        """Context in which a failure of any rank is raised on every rank. A collective at its end."""
        ...
