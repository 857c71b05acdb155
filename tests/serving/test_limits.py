"""Limits of size, time and queue, and what becomes of requests that nobody waits for."""

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from in_process import InProcess
from tiny_artifact import raw_rows

from hetegen_rec.data.errors import DataError
from hetegen_rec.serving.batching import OverloadedError

ROWS = raw_rows(40)
JSON_HEADERS = [(b"content-type", b"application/json")]
BODY = b'{"rows": [{"user_id": 101}]}'


def test_more_rows_than_allowed_are_refused(artifact):
    with InProcess(artifact, max_rows=3) as server:
        assert server.score(ROWS[:3]).status_code == 200
        answer = server.score(ROWS[:4])
        assert answer.status_code == 413
        assert "4 rows; send at most 3" in answer.json()["detail"]
        assert server.figure("hetegen_rows_total") == 3


def test_too_many_rows_are_counted_before_any_is_looked_at(artifact):
    with InProcess(artifact, max_rows=3) as server:
        assert server.score([17, *ROWS[:3]]).status_code == 413
        assert server.score([17, *ROWS[:2]]).status_code == 400


def test_a_body_of_declared_length_is_refused_unread(artifact):
    with InProcess(artifact, max_bytes=100) as server:
        assert server.ask("POST", "/v1/score", content=BODY, headers=JSON_HEADERS).status_code == 200
        answer = server.ask("POST", "/v1/score", content=BODY + b" " * 100, headers=JSON_HEADERS)
        assert answer.status_code == 413
        assert "more than 100 bytes" in answer.json()["detail"]


def test_a_body_without_declared_length_is_refused_where_it_grows_too_long(artifact):
    parts_read = 0

    async def endless():
        nonlocal parts_read
        while True:
            parts_read += 1
            yield b" " * 30

    with InProcess(artifact, max_bytes=100) as server:
        answer = server.ask("POST", "/v1/score", content=endless(), headers=JSON_HEADERS)
        assert answer.status_code == 413
    assert parts_read <= 5


def test_a_body_that_does_not_come_is_given_up(artifact):
    async def stuck():
        yield BODY[:5]
        await asyncio.sleep(60)

    with InProcess(artifact, body_seconds=0.05) as server:
        answer = server.ask("POST", "/v1/score", content=stuck(), headers=JSON_HEADERS)
        assert answer.status_code == 408


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(artifact):
    with InProcess(artifact, gated=True, queue_rows=10, batch_seconds=0, deadline_seconds=60) as server:
        with ThreadPoolExecutor() as threads:
            scored = threads.submit(server.score, ROWS[:1])
            assert server.gated.entered.wait(30)
            waiting = server.batcher.submit(ROWS[:8])
            answer = server.score(ROWS[:3])
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert "8 rows wait" in answer.json()["detail"]
            assert server.figure("hetegen_queue_rows") == 8
            fits = threads.submit(server.score, ROWS[:2])
            server.gated.gate.set()
            assert scored.result().status_code == fits.result().status_code == 200
            assert len(waiting.result()) == 8
        assert server.figure("hetegen_queue_rows") == 0


def test_a_request_longer_than_the_queue_is_taken_when_nothing_waits(artifact):
    with InProcess(artifact, queue_rows=10) as server:
        assert server.score(ROWS).status_code == 200


def test_a_request_without_scores_at_its_deadline_is_given_up(artifact):
    with InProcess(artifact, gated=True, batch_seconds=0, deadline_seconds=0.05) as server:
        answer = server.score(ROWS[:1])
        assert answer.status_code == 503
        assert "no scores after 0.05 s" in answer.json()["detail"]


def test_what_becomes_of_a_request_that_was_given_up_is_not_logged(artifact, caplog, monkeypatch):
    """Values of its rows stand in the error that it ends with."""
    given_up = threading.Event()

    def encode_late(rows):
        given_up.wait(30)
        raise DataError("secret")

    with InProcess(artifact, deadline_seconds=0.05) as server:
        monkeypatch.setattr(server.served.scorer, "ids", encode_late)
        assert server.score(ROWS[:1]).status_code == 503
        given_up.set()
        server.batcher.close()
        server.run(asyncio.sleep, 0.01)
        gc.collect()  # where nobody has seen the error of a future, asyncio logs it at its end
    assert [line for line in caplog.messages if "secret" in line] == []


def test_a_request_whose_client_left_is_not_scored(artifact):
    """Two requests: one holds the scoring thread, the other's client leaves while it waits."""
    sent = []

    async def ask_and_leave(app):
        messages = iter([{"type": "http.request", "body": BODY}, {"type": "http.disconnect"}])
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/score",
            "raw_path": b"/v1/score",
            "query_string": b"",
            "headers": JSON_HEADERS,
        }

        async def receive():
            return next(messages)

        async def send(message):
            sent.append(message)

        await app(scope, receive, send)

    with InProcess(artifact, gated=True, batch_seconds=0, deadline_seconds=60) as server:
        held = server.batcher.submit(ROWS[:2])
        assert server.gated.entered.wait(30)
        server.run(ask_and_leave, server.app)
        assert sent[0]["status"] == 499
        last = server.batcher.submit(ROWS[:3])
        server.gated.gate.set()
        assert len(held.result()) == 2
        assert len(last.result()) == 3
        assert server.gated.batches == [2, 3]
        assert server.figure("hetegen_dropped_requests_total") == 1
        assert server.figure("hetegen_requests_total", path="/v1/score", code="499") == 1


def test_what_waits_at_the_end_is_scored_and_nothing_more_is_taken(artifact):
    with InProcess(artifact, gated=True, batch_seconds=0) as server:
        held = server.batcher.submit(ROWS[:2])
        assert server.gated.entered.wait(30)
        waiting = [server.batcher.submit(ROWS[:3]) for _ in range(3)]
    np.testing.assert_allclose(held.result(), server.served.scorer.score(ROWS[:2]), atol=1e-6)
    assert [len(one.result()) for one in waiting] == [3, 3, 3]
    with pytest.raises(OverloadedError, match="stopping"):
        server.batcher.submit(ROWS[:1])
