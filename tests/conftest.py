"""Settings that all tests share."""

from hypothesis import settings

settings.register_profile("house", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("house")
