"""A server within the process of the test, asked through ASGI."""

import threading
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from anyio.from_thread import start_blocking_portal
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from hetegen_rec.scoring.scorer import Scorer
from hetegen_rec.serving.app import make_app
from hetegen_rec.serving.batching import Batcher
from hetegen_rec.serving.metrics import Metrics
from hetegen_rec.serving.served import ServedArtifact
from hetegen_rec.serving.settings import Settings


class Gated:
    """A scorer that scores only while its gate is open, and notes the size of each batch."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.gate, self.entered = threading.Event(), threading.Event()
        self.batches: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def score_ids(self, ids: NDArray[np.int64], *others: Any) -> NDArray[np.float32]:
        self.batches.append(len(ids))
        self.entered.set()
        assert self.gate.wait(30)
        return self._scorer.score_ids(ids, *others)


class InProcess:
    """Everything that `hetegen serve` runs but the sockets. Threads may ask it at a time."""

    def __init__(self, path: Path, *, gated: bool = False, **settings: Any) -> None:
        self.settings, self.metrics = Settings(**settings), Metrics()
        self.served = ServedArtifact(path, self.metrics, strategy=self.settings.strategy)
        self.gated = Gated(self.served.scorer)
        self._scorer = (lambda: self.gated) if gated else (lambda: self.served.scorer)
        self._parts = ExitStack()

    def __enter__(self) -> "InProcess":
        self._parts.enter_context(closing(self.served))
        batcher = Batcher(self._scorer, self.settings, self.metrics)  # type: ignore[arg-type]
        self.batcher = self._parts.enter_context(closing(batcher))
        self.app = make_app(self.served, self.batcher, self.metrics, self.settings)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://served")
        self._portal = self._parts.enter_context(start_blocking_portal())
        return self

    def __exit__(self, *_: object) -> None:
        self.gated.gate.set()
        self._parts.close()

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._portal.call(partial(self._client.request, method, path, **options))

    def score(self, rows: Any, **others: Any) -> httpx.Response:
        return self.ask("POST", "/v1/score", json={"rows": rows, **others})

    def run(self, function: Any, *arguments: Any) -> Any:
        """Awaits a coroutine function on the loop of the server."""
        return self._portal.call(function, *arguments)

    def figure(self, name: str, /, **labels: str) -> float | None:
        """One figure of /metrics; None if it is not there."""
        families = text_string_to_metric_families(self.ask("GET", "/metrics").text)
        found = [
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(found) if found else None
