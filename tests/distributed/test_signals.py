"""Requests to stop are noted within the context, and obeyed as usual outside of it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hetegen_rec.distributed.signals import StopRequest

OUTSIDE = """
import os, signal
from hetegen_rec.distributed.signals import StopRequest
with StopRequest():
    os.kill(os.getpid(), signal.{name})
print("alive", flush=True)
os.kill(os.getpid(), signal.{name})
print("still alive")
"""


def send(*signals: signal.Signals) -> None:
    for number in signals:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("sent", "noted"),
    [
        ([], None),
        ([signal.SIGTERM], "SIGTERM"),
        ([signal.SIGUSR1], "SIGUSR1"),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGTERM], "SIGTERM"),
        ([signal.SIGUSR1, signal.SIGTERM], "SIGUSR1"),
    ],
)
def test_the_first_request_is_noted(sent, noted):
    with StopRequest() as stop:
        send(*sent)
        assert stop.requested == noted
    assert stop.requested == noted


def test_a_request_that_nobody_looked_at_is_known_after_the_context():
    with StopRequest() as stop:
        send(signal.SIGUSR1)
    assert stop.requested == "SIGUSR1"


def test_signals_of_others_are_no_request():
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        with StopRequest() as stop:
            send(signal.SIGUSR2)
            assert stop.requested is None
            send(signal.SIGTERM)
            assert stop.requested == "SIGTERM"
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_another_thread_sees_it_while_the_main_thread_runs_no_python():
    seen: list[float] = []

    def look(stop: StopRequest) -> None:
        while not stop.requested:
            time.sleep(0.01)
        seen.append(time.monotonic())

    with StopRequest() as stop:
        thread = threading.Thread(target=look, args=(stop,))
        thread.start()
        killer = "import os, signal, sys, time; time.sleep(0.3); os.kill(int(sys.argv[1]), signal.SIGTERM)"
        with subprocess.Popen([sys.executable, "-c", killer, str(os.getpid())]):
            lock = threading.Lock()
            lock.acquire()
            lock.acquire(timeout=2)
        thread.join()
    assert seen


def test_handlers_and_wakeup_of_before_are_back_afterwards():
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with StopRequest():
            assert signal.getsignal(signal.SIGTERM) != mine
        assert signal.getsignal(signal.SIGTERM) == mine
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_outside_of_the_context_a_request_ends_the_process(name):
    command = [sys.executable, "-c", OUTSIDE.format(name=name)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "alive\n"
    assert result.returncode == -getattr(signal, name)
