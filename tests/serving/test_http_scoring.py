"""What POST /v1/score answers, to good requests and to bad ones."""

import json
import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process import InProcess
from tiny_artifact import raw_rows

from hetegen_rec.serving.bodies import ARROW_STREAM, JSON


def stream(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    names = sorted({name for row in rows for name in row})
    return pa.table({name: [row.get(name) for row in rows] for name in names})


ROWS = raw_rows(40)
TABLE = table_of(ROWS)
STREAM = stream(TABLE)


def post(server: InProcess, body: bytes, content_type: str | None = JSON, **headers: str):
    given = {"content-type": content_type} if content_type else {}
    return server.ask("POST", "/v1/score", content=body, headers={**given, **headers})


def expected(server: InProcess, rows: Any) -> np.ndarray:
    return server.served.scorer.score(rows)


def test_json_rows_get_the_scores_of_the_scorer(server):
    answer = server.score(ROWS)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == JSON
    np.testing.assert_allclose(answer.json()["probabilities"], expected(server, ROWS), atol=1e-6)


def test_an_arrow_stream_is_answered_by_one(server):
    answer = post(server, STREAM, ARROW_STREAM)
    assert answer.headers["content-type"] == ARROW_STREAM
    scores = pa.ipc.open_stream(answer.content).read_all()
    assert scores.schema == pa.schema([("probability", pa.float32())])
    np.testing.assert_allclose(scores["probability"], expected(server, ROWS), atol=1e-6)


def test_shared_columns_hold_for_every_row(server):
    shared = {"user_id": 101, "city": "Rome", "history": [3, 5]}
    rows = [{"item_id": item} for item in range(1, 9)]
    answer = server.score(rows, shared=shared)
    whole = [{**shared, **row} for row in rows]
    np.testing.assert_allclose(answer.json()["probabilities"], expected(server, whole), atol=1e-6)
    assert len(set(answer.json()["probabilities"])) == 8


def test_shared_columns_that_grow_too_large_over_the_rows_are_refused(server):
    answer = server.score([{}] * 1000, shared={"history": [1] * 100_000})
    assert answer.status_code == 413
    assert "send fewer rows" in answer.json()["detail"]


@pytest.mark.parametrize("body", [b'{"rows": []}', stream(TABLE.slice(0, 0))], ids=["json", "arrow"])
def test_no_rows_get_no_scores(server, body):
    content_type = JSON if body.startswith(b"{") else ARROW_STREAM
    assert post(server, body, content_type).status_code == 200


def test_more_rows_of_arrow_than_allowed_are_refused(server):
    many = pa.table({"user_id": pa.nulls(server.settings.max_rows + 1, pa.int64())})
    answer = post(server, stream(many), ARROW_STREAM)
    assert answer.status_code == 413
    assert "send at most 4,096" in answer.json()["detail"]


def test_columns_that_nobody_reads_do_no_harm(server):
    odd = pa.array([{"a": 1}] * len(TABLE))
    answer = post(server, stream(TABLE.append_column("odd", odd)), ARROW_STREAM)
    assert answer.status_code == 200


BAD_JSON = {
    "nothing": (b"", 400, "is no JSON"),
    "half": (b'{"rows": [{"user_id": 1}', 400, "is no JSON"),
    "not UTF-8": (b'{"rows": [{"city": "\xff\xfe\xff"}]}', 400, "is no JSON"),
    "nested too deeply": (b"[" * 100_000, 400, "nested too deeply"),
    "a number of many digits": (b'{"rows": [{"user_id": ' + b"1" * 5000 + b"}]}", 400, "is no JSON"),
    "a list": (b"[]", 400, "the body must be"),
    "no rows": (b"{}", 400, "the body must be"),
    "rows of numbers": (b'{"rows": [1]}', 400, "row 0 is no object"),
    "an unknown key": (b'{"rows": [], "row": []}', 400, "has the key 'row'"),
    "shared is a list": (b'{"rows": [], "shared": []}', 400, "`shared` must be an object"),
    "a column twice": (b'{"rows": [{"age": 1}], "shared": {"age": 2}}', 400, "row 0 has the column 'age'"),
    "text for an integer": (b'{"rows": [{"user_id": "a"}]}', 422, "column 'user_id'"),
    "mixed types": (b'{"rows": [{"user_id": 1}, {"user_id": "a"}]}', 422, "column 'user_id'"),
    "no list": (b'{"rows": [{"history": 3}]}', 422, "column 'history'"),
    "an object": (b'{"rows": [{"city": {"a": 1}}]}', 422, "column 'city'"),
    "half a surrogate pair": (b'{"rows": [{"city": "\\ud800"}]}', 422, "column 'city'"),
    "half a pair as key": (b'{"rows": [], "\\ud800": 1}', 400, "has the key"),
    "more than 64 bits": (b'{"rows": [{"user_id": 36893488147419103232}]}', 422, "column 'user_id'"),
}


@pytest.mark.parametrize(("body", "status", "told"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_told_what_is_wrong(server, body, status, told):
    answer = post(server, body)
    assert (answer.status_code, told in answer.json()["detail"]) == (status, True), answer.text


def without(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.drop_columns([name]).append_column(name, values)


N = len(TABLE)
BAD_STREAMS = {
    "nothing": (b"", 400, "no Arrow IPC stream"),
    "text": (b"user_id,item_id\n1,2\n", 400, "no Arrow IPC stream"),
    "half": (STREAM[: len(STREAM) // 2], 400, "no Arrow IPC stream"),
    "lz4": (stream(TABLE, compression="lz4"), 422, "without compression"),
    "zstd": (stream(TABLE, compression="zstd"), 422, "without compression"),
    "dictionary": (
        stream(without(TABLE, "city", pa.array(["Rome"] * N).dictionary_encode())),
        422,
        "dictionary-encoded",
    ),
    "views": (stream(without(TABLE, "city", pa.array(["Rome"] * N, pa.string_view()))), 422, "column 'city'"),
    "structs": (stream(without(TABLE, "city", pa.array([{"a": 1}] * N))), 422, "column 'city'"),
    "bytes": (stream(without(TABLE, "city", pa.array([b"Rome"] * N))), 422, "column 'city'"),
    "lists of lists": (stream(without(TABLE, "tags", pa.array([[["a"]]] * N))), 422, "column 'tags'"),
    "nulls without end": (
        stream(
            without(
                TABLE.slice(0, 1),
                "tags",
                pa.ListArray.from_arrays(pa.array([0, 1 << 30], pa.int32()), pa.nulls(1 << 30)),
            )
        ),
        422,
        "more values in its lists",
    ),
    "a column twice": (stream(TABLE.append_column("city", TABLE["city"])), 400, "stands twice"),
    "a column less": (stream(TABLE.drop_columns(["city"])), 422, "column 'city'"),
    "rows without columns": (stream(pa.table({"odd": pa.nulls(5)})), 422, "column"),
    "not UTF-8": (
        stream(without(TABLE, "city", pa.array([b"\xff"] * N).view(pa.string()))),
        400,
        "no Arrow IPC stream",
    ),
}


@pytest.mark.parametrize(("body", "status", "told"), BAD_STREAMS.values(), ids=BAD_STREAMS)
def test_a_bad_stream_is_told_what_is_wrong(server, body, status, told):
    answer = post(server, body, ARROW_STREAM)
    assert (answer.status_code, told in answer.json()["detail"]) == (status, True), answer.text


@pytest.mark.parametrize("content_type", [None, "text/csv", "application/x-www-form-urlencoded"])
def test_other_types_are_refused(server, content_type):
    answer = post(server, b"a,b", content_type)
    assert answer.status_code == 415
    assert JSON in answer.json()["detail"]


def test_parameters_of_the_content_type_do_no_harm(server):
    assert post(server, b'{"rows": []}', "Application/JSON; charset=utf-8").status_code == 200


def test_compressed_bodies_are_refused(server):
    assert post(server, b'{"rows": []}', **{"content-encoding": "gzip"}).status_code == 415


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/score", 405),
        ("POST", "/v1/scores", 404),
        ("POST", "/v1/reload", 404),
        ("GET", "/docs", 404),
    ],
)
def test_other_paths_and_methods_are_refused(server, method, path, status):
    assert server.ask(method, path).status_code == status


def test_the_description_names_both_content_types(server):
    operation = server.ask("GET", "/openapi.json").json()["paths"]["/v1/score"]["post"]
    assert set(operation["requestBody"]["content"]) == {JSON, ARROW_STREAM}
    assert {"200", "400", "408", "413", "415", "422", "503"} <= set(operation["responses"])


def test_health_names_the_artifact(server):
    answer = server.ask("GET", "/healthz")
    assert answer.status_code == 200
    named = answer.json()["artifact"]
    assert (named["name"], named["step"], named["backend"]) == ("tiny", 10, "aten")


# Fuzzing. Whatever comes, the server must not fail: it is the caller who is wrong.

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**63), 2**64)
    | st.floats()
    | st.text(st.characters(), max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)
COLUMNS = st.sampled_from(["user_id", "city", "device", "age", "tags", "history", "item_id", "other"])
FUZZED_ROWS = st.lists(st.dictionaries(COLUMNS, VALUES, max_size=7), max_size=4)


@given(rows=FUZZED_ROWS, shared=st.none() | st.dictionaries(COLUMNS, VALUES, max_size=3))
def test_fuzzed_rows_never_fail_the_server(server, rows, shared):
    body = {"rows": rows} if shared is None else {"rows": rows, "shared": shared}
    answer = post(server, json.dumps(body).encode())
    assert answer.status_code in {200, 400, 422}, answer.text
    if answer.status_code == 200:
        assert len(answer.json()["probabilities"]) == len(rows)


@pytest.mark.parametrize("depth", [50, 400, 900, 980, 5000])
@pytest.mark.parametrize("place", [b'{"rows": [{"tags": %s}]}', b'{"rows": [{}], "shared": {"tags": %s}}'])
def test_deep_values_never_fail_the_server(server, place, depth):
    assert post(server, place % (b"[" * depth + b"]" * depth)).status_code in {400, 422}
    assert post(server, place % (b'{"a":' * depth + b"1" + b"}" * depth)).status_code in {400, 422}


@given(body=VALUES)
def test_fuzzed_documents_never_fail_the_server(server, body):
    assert post(server, json.dumps(body).encode()).status_code < 500


@given(body=st.binary(max_size=200), content_type=st.sampled_from([JSON, ARROW_STREAM]))
def test_random_bytes_never_fail_the_server(server, body, content_type):
    assert post(server, body, content_type).status_code < 500


@given(st.lists(st.tuples(st.integers(0, len(STREAM) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_streams_never_fail_the_server(server, damage):
    body = bytearray(STREAM)
    for place, value in damage:
        body[place] = value
    assert post(server, bytes(body), ARROW_STREAM).status_code < 500


# What is told of requests.


def test_one_line_a_request_without_what_it_held(server, caplog):
    with caplog.at_level(logging.INFO, "hetegen_rec.serving"):
        answer = server.ask(
            "POST",
            "/v1/score?key=secret1",
            json={"rows": [{"city": "secret2", "user_id": "secret3"}]},
            headers={"authorization": "secret4"},
        )
    assert answer.status_code == 422
    (line,) = caplog.messages
    assert line.startswith("POST /v1/score 422 1 rows ")
    assert "secret" not in line


def test_a_path_cannot_break_the_line(server, caplog):
    with caplog.at_level(logging.INFO, "hetegen_rec.serving"):
        server.ask("GET", "/a%0aGET /healthz 200")
    (line,) = caplog.messages
    assert "\n" not in line
    assert line.startswith("GET /a%0a")


def test_requests_rows_and_batches_are_counted(artifact):
    with InProcess(artifact) as server:
        server.score(ROWS)
        server.score([{"user_id": "text"}])
        server.ask("GET", "/no-such-path")
        assert server.figure("hetegen_requests_total", path="/v1/score", code="200") == 1
        assert server.figure("hetegen_requests_total", path="/v1/score", code="422") == 1
        assert server.figure("hetegen_requests_total", path="other", code="404") == 1
        assert server.figure("hetegen_request_seconds_count", path="/v1/score") == 2
        assert server.figure("hetegen_rows_total") == len(ROWS)
        assert server.figure("hetegen_batch_rows_sum") == len(ROWS)
        assert server.figure("hetegen_batch_seconds_count") == 1
        assert server.figure("hetegen_queue_rows") == 0
        assert server.figure("hetegen_artifact_info", name="tiny", step="10", backend="aten") == 1
