"""Exit codes of this program and of its ranks, beside 0 and those of signals (128 + number).

124, of a rank that hung, stands in `hetegen_rec.distributed.watchdog`; 1 is an error that nobody foresaw,
told with a traceback.
"""

FAILED = 2
"""An error that the person can mend. Starting again without a change would fail again."""

LOST_PEER = 3
"""This rank ended only because another one failed or went. Starting again may do."""
