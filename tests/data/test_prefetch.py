"""Iterators run ahead in a thread: order, how far ahead, errors, and the end of the thread."""

import gc
import subprocess
import sys
import threading
import time

import pytest

from hetegen_rec.data.prefetch import prefetch


def wait_until(condition):
    """Gives a background thread time to get somewhere; the limit is only for a failing test."""
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


class Source:
    """Counts, and tells how far it got and whether it was closed."""

    def __init__(self, stop):
        self.stop = stop
        self.made = 0
        self.thread = None
        self.closed = False

    def items(self):
        self.thread = threading.current_thread()
        try:
            for item in range(self.stop):
                self.made = item + 1
                yield item
        finally:
            self.closed = True


def test_items_come_in_order_and_end():
    items = prefetch(Source(100).items(), depth=3)
    assert list(items) == list(range(100))
    assert list(items) == []


def test_it_runs_ahead_by_the_depth_and_no_further():
    source = Source(100)
    items = prefetch(source.items(), depth=3)
    assert next(items) == 0
    wait_until(lambda: source.made == 4)
    time.sleep(0.02)
    assert source.made == 4
    assert source.thread is not threading.current_thread()


def test_an_error_comes_where_its_item_would_have_been():
    def failing():
        yield 1
        yield 2
        raise KeyError("the third")

    items = prefetch(failing(), depth=5)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(KeyError, match="the third"):
        next(items)


@pytest.mark.parametrize("abandon", ["close", "collect"])
def test_leaving_early_ends_the_thread_and_closes_the_source(abandon):
    source = Source(100)
    items = prefetch(source.items(), depth=2)
    next(items)
    if abandon == "close":
        items.close()
    del items
    gc.collect()
    wait_until(lambda: not source.thread.is_alive())
    assert source.closed
    assert source.made <= 4


def test_prefetching_can_be_chained():
    inner = Source(100)

    def doubled(numbers):
        for number in numbers:
            yield 2 * number

    items = prefetch(doubled(prefetch(inner.items(), depth=1)), depth=2)
    assert [next(items) for _ in range(10)] == list(range(0, 20, 2))
    items.close()
    del items
    gc.collect()
    wait_until(lambda: not inner.thread.is_alive())


LEFT_OPEN = """
import time
from hetegen_rec.data.prefetch import prefetch

def items():
    try:
        while True:
            time.sleep(0.05)
            yield 1
    finally:
        print("closed\\n", end="")  # at once, as two threads write

left_open = [prefetch(items(), depth=2) for _ in range(2)]
for one in left_open:
    next(one)
"""


def test_threads_end_before_the_interpreter_does():
    """It aborts the process where it cuts off a thread that is within a library of C++."""
    done = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, check=True)
    assert done.stdout == "closed\nclosed\n"
