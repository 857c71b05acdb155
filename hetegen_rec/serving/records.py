"""One line of the log and one count of the metrics for every request."""

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hetegen_rec.serving.metrics import Metrics

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""Status told of a request whose client did not wait for the answer: not HTTP's own, but in common use."""
_FAILED = 500
_LONGEST_PATH = 200


class Records:
    """ASGI middleware. Neither bodies nor headers nor query strings are told: they may hold secrets."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        """Wraps an application.

        Args:
            app: the application.
            metrics: told of every request.
            paths: those that the application has; all others are one in the metrics.
        """
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, and tells of it at its end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, start = CLIENT_LEFT, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = _FAILED
            raise
        finally:
            self._tell(scope, status, time.perf_counter() - start)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        self._metrics.requests.labels(path, status).inc()
        self._metrics.request_seconds.labels(path).observe(seconds)
        # As it was sent: percent-encoded, so that it cannot break the line.
        sent = scope["raw_path"].decode("ascii", "replace")[:_LONGEST_PATH]
        num_rows = scope.get("state", {}).get("num_rows", 0)
        logger.info("%s %s %d %d rows %.1f ms", scope["method"], sent, status, num_rows, 1e3 * seconds)
