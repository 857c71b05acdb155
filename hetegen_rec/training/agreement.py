"""What the ranks agree on after every step, without waiting: to stop, to save, that all is well.

A signal reaches one rank, a clock runs out on one rank, a loss is infinite on one rank; but all ranks must
act after the same step.
"""

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from hetegen_rec.distributed.runtime import Runtime


@dataclass(frozen=True)
class Wishes:
    """What one rank wants, or what any rank wanted."""

    stop: bool = False
    """The process was asked to end."""
    save: bool = False
    """A checkpoint is due by the clock."""
    report: bool = False
    """Something was not finite."""

    def __or__(self, other: "Wishes") -> "Wishes":
        return Wishes(*(getattr(self, name) or getattr(other, name) for name in _NAMES))

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in _NAMES)


_NAMES = [field.name for field in fields(Wishes)]


class Agreement:
    """Shares the wishes of one step while the next one runs."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._shared: tuple[torch.Tensor, dist.Work] | None = None

    def share(self, wishes: Wishes) -> Wishes:
        """Tells this step's wishes, and returns those of all ranks as of the step before. A collective."""
        before = self.settle()
        told = torch.tensor([getattr(wishes, name) for name in _NAMES], dtype=torch.int32)
        work = dist.all_reduce(told, dist.ReduceOp.MAX, group=self._runtime.host_group, async_op=True)
        assert work is not None  # it is for asynchronous calls
        self._shared = told, work
        return before

    def reach(self, wishes: Wishes) -> Wishes:
        """The wishes of all ranks as of now, and those told before. A collective that waits."""
        before = self.share(wishes)
        return before | self.settle()

    def settle(self) -> Wishes:
        """The wishes of all ranks that were told last, waited for; none if they were returned already."""
        if self._shared is None:
            return Wishes()
        told, work = self._shared
        self._shared = None
        work.wait()
        return Wishes(*(bool(value) for value in told.tolist()))
