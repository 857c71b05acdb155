"""`hetegen serve` as a user starts it."""

import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from tiny_artifact import raw_rows

from hetegen_rec.files import replace_directory
from hetegen_rec.main import main
from hetegen_rec.scoring.scorer import Scorer

ROWS = raw_rows(20)
PATIENCE = 60
TRAINING_ONLY = (
    "torchrec",
    "fbgemm_gpu",
    "tensordict",
    "torchmetrics",
    "torchx",
    "tensorboard",
    "rich",
    "psutil",
)
START = f"""
import sys
sys.modules.update(dict.fromkeys({TRAINING_ONLY}))
from hetegen_rec.main import main
sys.exit(main())
"""
"""Runs `hetegen` where nothing is installed that only training needs."""


class Process:
    """A server in a process of its own; its log is read line by line."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.url = self.wait_for(r" on (http://\S+)")

    def wait_for(self, pattern: str) -> str:
        """What the pattern's group matches in the first line of the log that fits."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            found = re.search(pattern, line)
            if found:
                return found[1]
        raise AssertionError(f"the server ended without a line of {pattern!r}")

    def score(self) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/score", json={"rows": ROWS}, timeout=PATIENCE)


@contextmanager
def serving(path: Path, *options: str) -> Iterator[Process]:
    command = [sys.executable, "-c", START, "serve", str(path), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield Process(process)
    finally:
        process.kill()
        process.communicate()


def test_it_serves_reloads_on_a_signal_and_ends_in_peace(path, newer):
    before, after = Scorer.load(path).score(ROWS), Scorer.load(newer).score(ROWS)
    # So long may a request wait for others that the server is told to stop while this one waits.
    with serving(path, "--watch-ms", "0", "--batch-ms", "1000", "--deadline-ms", "60000") as server:
        np.testing.assert_allclose(server.score().json()["probabilities"], before, atol=1e-6)
        replace_directory(Path(shutil.copytree(newer, path.with_name("coming"))), path)
        server.process.send_signal(signal.SIGHUP)
        assert "step 20" in server.wait_for(r"(scores by .*) from now on")
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(server.score)
            wait_for_queue(server.url)
            server.process.send_signal(signal.SIGTERM)
            np.testing.assert_allclose(answer.result().json()["probabilities"], after, atol=1e-6)
        assert server.process.wait(PATIENCE) == 0


def wait_for_queue(url: str) -> None:
    """Returns once the rows of a request wait."""
    while f"hetegen_queue_rows {len(ROWS)}.0" not in httpx.get(f"{url}/metrics", timeout=PATIENCE).text:
        pass


def test_as_many_connections_as_allowed_are_answered_and_no_more(path):
    with serving(path, "--max-connections", "1") as server, httpx.Client(timeout=PATIENCE) as first:
        assert first.get(f"{server.url}/healthz").status_code == 200
        assert httpx.get(f"{server.url}/healthz", timeout=PATIENCE).status_code == 503
        assert first.get(f"{server.url}/healthz").status_code == 200


def test_an_address_in_use_is_a_clear_error(path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["serve", str(path), "--port", str(other.getsockname()[1])]) == 2
    assert re.fullmatch(r"error: .*Address already in use.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--max-rows", "0"], "0 is not positive"),
        (["--batch-ms", "-1"], "-1 is not within 0 and 3600000 milliseconds"),
        (["--batch-ms", "1e300"], "1e300 is not within 0 and 3600000 milliseconds"),
        (["--deadline-ms", "0"], "0 leaves no time to score"),
        (["--port", "65536"], "65536 is not within 0 and 65535"),
        (["--backend", "jit"], "invalid choice"),
    ],
)
def test_options_that_make_no_sense_are_refused(path, capsys, options, told):
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(path), *options])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_no_artifact_is_a_clear_error(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "nothing")]) == 2
    assert "no artifact" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_remedy(path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "hetegen_rec.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(path)]) == 2
    told = capsys.readouterr().err
    assert "the server needs uvicorn" in told
    assert "requirements/serve.txt" in told
