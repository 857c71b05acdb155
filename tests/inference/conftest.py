"""What the tests of this room share."""

from one_thread import one_thread  # noqa: F401
