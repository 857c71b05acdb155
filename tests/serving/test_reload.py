"""Another artifact takes the place of the one that is served, while it is."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from in_process import InProcess
from tiny_artifact import raw_rows

from hetegen_rec.files import replace_directory
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.scoring.scorer import Scorer
from hetegen_rec.serving.metrics import Metrics
from hetegen_rec.serving.served import ServedArtifact

ROWS = raw_rows(20)
LOOK = 0.02
PATIENCE = 60.0


def put(source: Path, target: Path) -> None:
    """Puts a copy of an artifact in the place of another, as `hetegen export` does."""
    replace_directory(Path(shutil.copytree(source, target.with_name("coming"))), target)


def damage(artifact: Path) -> None:
    """Flips a bit of the largest table."""
    file = max((artifact / "tables").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def wait_until(what) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(LOOK)


def reloads(server: InProcess, result: str) -> float | None:
    return server.figure("hetegen_reloads_total", result=result)


def test_a_new_artifact_at_the_path_scores_and_no_request_is_lost(path, newer):
    before, after = Scorer.load(path).score(ROWS), Scorer.load(newer).score(ROWS)
    assert np.abs(before - after).max() > 1e-3
    done = threading.Event()

    def ask_on_and_on(server):
        answers = []
        while not done.is_set():
            answers.append(server.score(ROWS))
        return answers

    with InProcess(path) as server, ThreadPoolExecutor(4) as threads:
        server.served.watch(LOOK)
        asking = [threads.submit(ask_on_and_on, server) for _ in range(4)]
        wait_until(lambda: server.figure("hetegen_rows_total") > 0)
        put(newer, path)
        try:
            wait_until(lambda: reloads(server, "loaded") == 1)
            scored = server.score(ROWS)
        finally:
            done.set()
        answers = [answer for one in asking for answer in one.result()]
        assert {answer.status_code for answer in answers} == {200}
        for answer in answers:
            found = np.array(answer.json()["probabilities"])
            assert min(np.abs(found - before).max(), np.abs(found - after).max()) < 1e-6
        np.testing.assert_allclose(scored.json()["probabilities"], after, atol=1e-6)
        assert server.figure("hetegen_artifact_info", step="20") == 1
        assert server.figure("hetegen_artifact_info", step="10") is None


def test_a_broken_artifact_leaves_the_earlier_one_and_says_so(path, newer, caplog):
    before = Scorer.load(path).score(ROWS)
    with InProcess(path) as server:
        server.served.watch(LOOK)
        broken = Path(shutil.copytree(newer, path.with_name("broken")))
        damage(broken)
        put(broken, path)
        wait_until(lambda: reloads(server, "failed") == 1)
        assert any("the earlier artifact goes on" in line and "checksum" in line for line in caplog.messages)
        np.testing.assert_allclose(server.score(ROWS).json()["probabilities"], before, atol=1e-6)
        assert server.ask("GET", "/healthz").json()["artifact"]["step"] == 10
        time.sleep(10 * LOOK)
        assert reloads(server, "failed") == 1  # it is tried again only when it changes
        put(newer, path)
        wait_until(lambda: reloads(server, "loaded") == 1)
        assert server.ask("GET", "/healthz").json()["artifact"]["step"] == 20


def test_a_missing_artifact_is_not_tried(path, newer):
    with InProcess(path) as server:
        server.served.watch(LOOK)
        shutil.rmtree(path)
        time.sleep(10 * LOOK)
        assert reloads(server, "failed") == 0
        assert server.score(ROWS).status_code == 200
        put(newer, path)
        wait_until(lambda: reloads(server, "loaded") == 1)


def test_a_reload_that_is_asked_for_needs_no_watching(path, newer):
    with InProcess(path) as server:
        server.served.watch(0)
        put(newer, path)
        server.served.ask_reload()
        wait_until(lambda: reloads(server, "loaded") == 1)
        assert server.ask("GET", "/healthz").json()["artifact"]["step"] == 20


def test_the_reload_endpoint_answers_with_what_scores_now(path, newer):
    with InProcess(path, reload_endpoint=True) as server:
        put(newer, path)
        answer = server.ask("POST", "/v1/reload")
        assert (answer.status_code, answer.json()["artifact"]["step"]) == (200, 20)
        damage(path)
        answer = server.ask("POST", "/v1/reload")
        assert answer.status_code == 409
        assert "checksum" in answer.json()["detail"]
        assert server.score(ROWS).status_code == 200


def test_an_artifact_that_changes_while_it_is_read_is_not_taken(path, newer, monkeypatch):
    served = ServedArtifact(path, Metrics())
    load = Scorer.load

    def load_and_replace(*arguments, **options):
        scorer = load(*arguments, **options)
        put(newer, path)
        return scorer

    monkeypatch.setattr(Scorer, "load", load_and_replace)
    with pytest.raises(ArtifactError, match="changed while it was read"):
        served.reload()
    monkeypatch.undo()
    assert served.reload().artifact.manifest.step == 20


def test_a_network_that_cannot_score_is_not_taken(path, monkeypatch):
    served = ServedArtifact(path, Metrics())
    earlier = served.scorer
    monkeypatch.setattr(Scorer, "score_ids", lambda *_: 1 / 0)
    with pytest.raises(ArtifactError, match="cannot be loaded: division by zero"):
        served.reload()
    assert served.scorer is earlier


def test_an_artifact_without_the_strategy_is_not_served(path):
    with pytest.raises(ArtifactError, match="uncertainty"):
        ServedArtifact(path, Metrics(), strategy="uncertainty")
