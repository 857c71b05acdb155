"""HeteGenCTR: generative click-through-rate models with per-field difficulty, on TorchRec."""

from hetegen_rec._stack import StackError, check_stack, installed_stack

__all__ = ["StackError"]

_stack = installed_stack()
# Who only scores by an artifact has neither; the command `hetegen` checks again for what trains.
if not _stack.is_for_scoring:
    check_stack(_stack)
