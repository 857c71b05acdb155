"""HeteGenCTR: generative click-through-rate models with per-field difficulty, on TorchRec."""

from hetegen_rec._stack import StackError, check_stack, installed_stack

__all__ = ["StackError"]

check_stack(installed_stack())
