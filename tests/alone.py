"""One process that prepares data without a job, for tests of the data room."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Alone:
    """Implements `hetegen_rec.data.workers.Workers` without a process group."""

    rank = 0
    world_size = 1

    def gather(self, value: Any) -> list[Any]:
        """Just this process's value."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """This process's value."""
        return self.gather(value)[0]

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A failure is raised where it happens."""
        yield
