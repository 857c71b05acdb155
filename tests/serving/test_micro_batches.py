"""Rows of many requests are scored together, and each caller gets those of its own."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pytest
from in_process import InProcess
from tiny_artifact import raw_rows

from hetegen_rec.data.errors import DataError

ROWS = raw_rows(200)


@contextmanager
def held(artifact, **settings):
    """A server whose scoring thread is busy with one row, so that whatever comes waits."""
    with InProcess(artifact, gated=True, batch_seconds=0, deadline_seconds=60, **settings) as server:
        first = server.batcher.submit(ROWS[:1])
        assert server.gated.entered.wait(30)
        yield server
        first.result()


def scores(server, rows):
    return server.served.scorer.score(rows)


def test_each_request_gets_the_scores_of_its_own_rows(artifact):
    parts = [ROWS[start : start + 1 + start % 7] for start in range(0, 60, 5)]
    with held(artifact) as server:
        waiting = [server.batcher.submit(part) for part in parts]
        server.gated.gate.set()
        for part, one in zip(parts, waiting, strict=True):
            np.testing.assert_allclose(one.result(), scores(server, part), atol=1e-6)
        assert server.gated.batches == [1, sum(map(len, parts))]


def test_tables_of_several_types_and_dictionaries_share_a_batch(artifact):
    names = ["user_id", "city", "device", "age", "tags", "history", "item_id"]
    table = pa.table({name: [row.get(name) for row in ROWS] for name in names})
    narrow = table.set_column(0, "user_id", table["user_id"].cast(pa.int32()))
    parts = [ROWS[:3], table.slice(3, 4), narrow.slice(7, 2), ROWS[9:11], table.slice(11, 5)]
    with held(artifact) as server:
        waiting = [server.batcher.submit(part) for part in parts]
        server.gated.gate.set()
        together = np.concatenate([one.result() for one in waiting])
        np.testing.assert_allclose(together, scores(server, ROWS[:16]), atol=1e-6)
        assert server.gated.batches == [1, 16]


def test_bad_rows_fail_their_own_request_only(artifact):
    parts = [ROWS[:2], [{"user_id": "text"}], ROWS[2:5], [{"history": [2.5]}]]
    with held(artifact) as server:
        waiting = [server.batcher.submit(part) for part in parts]
        server.gated.gate.set()
        for good in (0, 2):
            np.testing.assert_allclose(waiting[good].result(), scores(server, parts[good]), atol=1e-6)
        for bad, column in ((1, "user_id"), (3, "history")):
            with pytest.raises(DataError, match=column):
                waiting[bad].result()
        assert server.gated.batches == [1, 5]


def test_a_batch_holds_no_more_rows_than_allowed(artifact):
    sizes = [4, 4, 4, 20, 1]
    with held(artifact, batch_rows=10) as server:
        waiting = [server.batcher.submit(ROWS[:size]) for size in sizes]
        server.gated.gate.set()
        assert [len(one.result()) for one in waiting] == sizes
        assert server.gated.batches == [1, 8, 4, 20, 1]


def test_a_request_waits_for_others_until_a_batch_is_full(artifact):
    """The wait is much longer than the test: only a full batch can end it."""
    with InProcess(artifact, batch_seconds=600, batch_rows=6) as server:
        waiting = [server.batcher.submit(ROWS[:2]) for _ in range(3)]
        assert [len(one.result(timeout=60)) for one in waiting] == [2, 2, 2]
        assert server.figure("hetegen_batch_rows_count") == 1


def test_a_failing_network_fails_the_requests_and_not_the_thread(artifact, monkeypatch):
    with InProcess(artifact) as server:
        with monkeypatch.context() as patch:
            patch.setattr(server.served.scorer, "score_ids", lambda *_: 1 / 0)
            assert server.score(ROWS[:1]).status_code == 500
        assert server.figure("hetegen_requests_total", path="/v1/score", code="500") == 1
        assert server.score(ROWS[:1]).status_code == 200


def test_many_threads_at_a_time_get_their_own(artifact):
    parts = [ROWS[start : start + 1 + start % 9] for start in range(0, 180)]
    with InProcess(artifact) as server, ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(server.score, parts))
        assert {answer.status_code for answer in answers} == {200}
        for part, answer in zip(parts, answers, strict=True):
            np.testing.assert_allclose(answer.json()["probabilities"], scores(server, part), atol=1e-6)
        assert server.figure("hetegen_batch_rows_count") < len(parts)
