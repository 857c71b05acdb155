"""An iterator run ahead in a background thread."""

import atexit
from collections.abc import Generator
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import TypeAlias, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


_LAST_SECONDS = 5.0  # for an item at hand; a read from a store that hangs must not hold the process

_running: "WeakKeyDictionary[Thread, tuple[Event, Semaphore]]" = WeakKeyDictionary()


@atexit.register
def _end_threads() -> None:
    """Has all threads end before the interpreter does: it aborts where it cuts one off within a library."""
    running = list(_running.items())
    for _, (closed, slots) in running:
        closed.set()
        slots.release()
    for thread, _ in running:
        if thread.is_alive():
            thread.join(_LAST_SECONDS)


@dataclass(frozen=True)
class _End:
    """What the thread sends last: the error that ended the source, or none."""

    error: BaseException | None


_Items: TypeAlias = "SimpleQueue[T | _End]"


def prefetch(source: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yields what `source` yields while a thread makes the next ones.

    The thread starts with the first item asked for. When this generator is closed or collected, it
    ends after the item at hand and closes `source`; nobody waits for it.

    Args:
        source: run in the thread, from first to last.
        depth: most items made ahead, the one in the making included.

    Raises:
        Whatever `source` raises, at the place where its next item would have been.
    """
    slots, closed = Semaphore(depth), Event()
    items: _Items[T] = SimpleQueue()
    # The thread must not refer to this generator, or it would never be collected.
    thread = Thread(
        target=_produce, args=(source, items, slots, closed), name="hetegen-prefetch", daemon=True
    )
    _running[thread] = closed, slots
    thread.start()
    try:
        while True:
            item = items.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            slots.release()
            yield item
    finally:
        closed.set()
        slots.release()


def _produce(source: Generator[T, None, None], items: "_Items[T]", slots: Semaphore, closed: Event) -> None:
    error: BaseException | None = None
    try:
        while not closed.is_set():
            slots.acquire()
            if closed.is_set():
                break
            try:
                item = next(source)
            except StopIteration:
                break
            items.put(item)
            del item  # or this frame would keep it alive until the next one is made
        source.close()
    except BaseException as caught:
        error = caught
    finally:
        items.put(_End(error))
