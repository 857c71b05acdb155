"""Sustained load on `hetegen serve` from another process on this machine, with a reload in the middle.

    python -m benchmarks.serving_load ARTIFACT 'rows/*.parquet' --out benchmarks/results/serving_load.md

Every client sends one request after another over a connection of its own, of 1, 8 or 32 raw rows in turn, as
JSON. At half time another copy of the artifact takes the place of the one that is served. The clients share
the machine's cores with the server, so its figures are a lower bound.
"""

import argparse
import http.client
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import how_made
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.raw import column_keys, iter_tables, list_row_groups
from hetegen_rec.files import replace_directory
from hetegen_rec.scoring.manifest import open_artifact

SIZES = (1, 8, 32)
"""Rows of a request, in turn."""
_BODIES = 256  # of each size, so that requests differ
_START_SECONDS = 120.0
_ANSWER_SECONDS = 30.0
_RELOAD_SECONDS = 60.0
_WIDTH = 115


@dataclass(frozen=True)
class Answer:
    """What became of one request."""

    num_rows: int
    milliseconds: float
    problem: str | None
    """Why it is no answer of as many probabilities; None if it is one."""


@dataclass(frozen=True)
class Load:
    """What all clients saw."""

    seconds: float
    answers: list[Answer]
    reload_seconds: float
    """From the replacement until the new artifact scored."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints the table; returns 1 if a request failed."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, help="directory that `hetegen export` wrote")
    parser.add_argument("rows", nargs="+", help="raw rows: Parquet or CSV files")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load")
    parser.add_argument("--clients", type=int, default=8, help="that ask at a time")
    parser.add_argument(
        "--server", default="", metavar="OPTIONS", help="of `hetegen serve`, such as '--threads 2'"
    )
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args(given)
    schema = open_artifact(options.artifact).manifest.features
    bodies = {size: _bodies(options.rows, schema, size) for size in SIZES}
    with tempfile.TemporaryDirectory() as directory:
        served = Path(shutil.copytree(options.artifact, Path(directory) / "artifact"))
        with _serving(served, options.server.split()) as (port, artifact):
            load = put_load(port, bodies, options.clients, options.seconds, served)
    lines = [
        *report(load, options.clients),
        "",
        f"Served: {artifact}.",
        how_made("benchmarks.serving_load", given),
    ]
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("\n".join(["# Serving under load", "", *lines, ""]), encoding="utf-8")
    return int(any(answer.problem for answer in load.answers))


def put_load(
    port: int, bodies: Mapping[int, list[bytes]], num_clients: int, seconds: float, served: Path
) -> Load:
    """Asks a server for a time, and replaces its artifact at half of it.

    Args:
        port: of the server, on this machine.
        bodies: of requests, by their rows.
        num_clients: that ask at a time.
        seconds: to ask.
        served: the artifact's directory; a copy of it takes its place.
    """
    stop = threading.Event()
    start = time.perf_counter()
    with ThreadPoolExecutor(num_clients) as threads:
        clients = [threads.submit(_ask, port, bodies, stop, number) for number in range(num_clients)]
        try:
            time.sleep(seconds / 2)
            reload_seconds = _replace(port, served)
            time.sleep(max(0.0, seconds - (time.perf_counter() - start)))
        finally:
            stop.set()
        answers = [answer for client in clients for answer in client.result()]
    return Load(time.perf_counter() - start, answers, reload_seconds)


def report(load: Load, num_clients: int) -> list[str]:
    """The table, and a sentence on the whole."""
    lines = [
        "| rows a request | requests | errors | requests/s | rows/s | p50 | p99 |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size in SIZES:
        lines.append(_line(str(size), [one for one in load.answers if one.num_rows == size], load.seconds))
    lines.append(_line("all", load.answers, load.seconds))
    problems = sorted({answer.problem for answer in load.answers if answer.problem})
    text = (
        f"{num_clients} clients for {load.seconds:.0f} s. The artifact was replaced at half time; the new "
        f"one scored {load.reload_seconds:.1f} s later. "
        + (f"Errors: {'; '.join(problems[:5])}." if problems else "No request failed.")
    )
    return [*lines, "", *textwrap.wrap(text, _WIDTH)]


def _line(name: str, answers: Sequence[Answer], seconds: float) -> str:
    errors = sum(answer.problem is not None for answer in answers)
    rows = sum(answer.num_rows for answer in answers if answer.problem is None)
    times = [answer.milliseconds for answer in answers if answer.problem is None]
    p50, p99 = np.percentile(times, [50, 99]) if times else (float("nan"), float("nan"))
    return (
        f"| {name} | {len(answers):,} | {errors} | {len(answers) / seconds:,.0f} | {rows / seconds:,.0f} | "
        f"{p50:.1f} ms | {p99:.1f} ms |"
    )


def _ask(port: int, bodies: Mapping[int, list[bytes]], stop: threading.Event, number: int) -> list[Answer]:
    """One client: a request after the other, until it is to stop."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)
    turns = itertools.cycle((size, bodies[size][i]) for i in range(_BODIES) for size in bodies)
    answers = []
    for _ in range(number):  # the clients are not all at requests of one size
        next(turns)
    while not stop.is_set():
        size, body = next(turns)
        start = time.perf_counter()
        problem = _request(connection, body, size)
        answers.append(Answer(size, 1e3 * (time.perf_counter() - start), problem))
    connection.close()
    return answers


def _request(connection: http.client.HTTPConnection, body: bytes, num_rows: int) -> str | None:
    """What is wrong with the answer to one request, if anything."""
    try:
        connection.request("POST", "/v1/score", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    except (OSError, http.client.HTTPException) as error:
        connection.close()  # the next request opens it again
        return f"{type(error).__name__}: {error}"
    if response.status != 200:
        return f"status {response.status}"
    found = len(json.loads(content)["probabilities"])
    return None if found == num_rows else f"{found} probabilities for {num_rows} rows"


def _replace(port: int, served: Path) -> float:
    """Replaces the artifact; returns the seconds until the server has taken it."""
    replace_directory(Path(shutil.copytree(served, served.with_name("coming"))), served)
    start = time.perf_counter()
    while time.perf_counter() - start < _RELOAD_SECONDS:
        if re.search(rb'^hetegen_reloads_total{result="loaded"} 1', _get(port, "/metrics"), re.MULTILINE):
            return time.perf_counter() - start
        time.sleep(0.1)
    raise TimeoutError(f"the server did not take the new artifact within {_RELOAD_SECONDS:.0f} s")


def _get(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()


@contextmanager
def _serving(artifact: Path, options: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Context with the port of a server in a process of its own, and what it says of its artifact."""
    command = [sys.executable, "-m", "hetegen_rec.main", "serve", str(artifact), "--port", "0", *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            yield _started(process, log)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_ANSWER_SECONDS)
            process.kill()
            process.wait()


def _started(process: "subprocess.Popen[bytes]", log: Any) -> tuple[int, str]:
    """Waits until the server says where it listens."""
    end = time.perf_counter() + _START_SECONDS
    while time.perf_counter() < end and process.poll() is None:
        log.seek(0)
        found = re.search(r" serves (.*) on http://127\.0\.0\.1:(\d+)", log.read())
        if found:
            return int(found[2]), found[1]
        time.sleep(0.1)
    log.seek(0)
    raise RuntimeError(f"the server did not start: {log.read()}")


def _bodies(patterns: Sequence[str], schema: Schema, num_rows: int) -> list[bytes]:
    """Requests of so many rows each, from the first raw rows."""
    columns = list(column_keys(schema, labelled=False))
    rows = _rows(patterns, schema, columns)
    return [json.dumps({"rows": list(itertools.islice(rows, num_rows))}).encode() for _ in range(_BODIES)]


def _rows(patterns: Sequence[str], schema: Schema, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Raw rows in order, again and again."""
    while True:
        for group in list_row_groups(patterns):
            for table in iter_tables(group, schema, labelled=False):
                yield from table.select(columns).to_pylist()


if __name__ == "__main__":
    sys.exit(main())
