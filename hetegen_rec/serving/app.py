"""The HTTP interface: what each path does, and what is answered to bad requests."""

import asyncio
from typing import Any

import anyio
import numpy as np
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from hetegen_rec.data.errors import DataError
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.serving.batching import Batcher, OverloadedError
from hetegen_rec.serving.bodies import ARROW_STREAM, JSON, BodyError, Decoded, format_of
from hetegen_rec.serving.metrics import Metrics
from hetegen_rec.serving.records import CLIENT_LEFT, Records
from hetegen_rec.serving.served import ServedArtifact, identity
from hetegen_rec.serving.settings import Settings

_LONGEST_MESSAGE = 1000
_ROW: dict[str, Any] = {"type": "object", "description": "values by column; what is left out is missing"}
_SCORE_OPENAPI: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {
                "schema": {
                    "type": "object",
                    "required": ["rows"],
                    "additionalProperties": False,
                    "properties": {
                        "rows": {"type": "array", "items": _ROW},
                        "shared": {**_ROW, "description": "values by column that hold for every row"},
                    },
                }
            },
            ARROW_STREAM: {"schema": {"type": "string", "format": "binary"}},
        },
    },
    "responses": {
        "200": {
            "description": "A probability for each row, in the form of the request",
            "content": {
                JSON: {
                    "schema": {
                        "type": "object",
                        "required": ["probabilities"],
                        "properties": {"probabilities": {"type": "array", "items": {"type": "number"}}},
                    }
                },
                ARROW_STREAM: {"schema": {"type": "string", "format": "binary"}},
            },
        },
        "400": {"description": "The body is malformed"},
        "408": {"description": "The body came too slowly"},
        "413": {"description": "Too many rows or bytes"},
        "415": {"description": "Neither JSON nor an Arrow IPC stream"},
        "422": {"description": "Values are not of the types of the training rows"},
        "503": {"description": "Overloaded; the header Retry-After says when to ask again"},
    },
}


class Endpoints:
    """What the paths of one server do."""

    def __init__(
        self, served: ServedArtifact, batcher: Batcher, metrics: Metrics, settings: Settings
    ) -> None:
        """Takes the parts that the paths stand for."""
        self._served, self._batcher, self._metrics, self._settings = served, batcher, metrics, settings

    async def score(self, request: Request) -> Response:
        """Click probabilities of raw rows."""
        try:
            if request.headers.get("content-encoding", "identity") != "identity":
                raise BodyError(415, "Content-Encoding is not supported; send the body as it is")
            body_format = format_of(request.headers.get("content-type"))
            body = await self._body(request)
            rows = body_format.decode(body, self._served.scorer.columns, self._settings.max_rows)
            request.state.num_rows = len(rows)
            probabilities = await self._scored(request, rows)
        except BodyError as error:
            raise HTTPException(error.status, _told(error)) from error
        except DataError as error:
            raise HTTPException(422, _told(error)) from error
        except OverloadedError as error:
            raise HTTPException(503, _told(error), {"Retry-After": "1"}) from error
        except ClientDisconnect:
            return Response(status_code=CLIENT_LEFT)  # nobody reads it
        return Response(body_format.encode(probabilities), media_type=body_format.media_type)

    async def health(self) -> Response:
        """Whether the server scores, and by which artifact."""
        alive = self._batcher.is_alive
        content = {"status": "ok" if alive else "dead", "artifact": identity(self._served.scorer)}
        return JSONResponse(content, 200 if alive else 503)

    async def show_metrics(self) -> Response:
        """Figures for Prometheus."""
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def reload(self) -> Response:
        """Loads the artifact anew; if that fails the earlier one goes on."""
        try:
            scorer = await anyio.to_thread.run_sync(self._served.reload)
        except ArtifactError as error:
            raise HTTPException(409, _told(error)) from error
        return JSONResponse({"artifact": identity(scorer)})

    async def _body(self, request: Request) -> bytes:
        """The body, if it comes in time and is not too long."""
        limit = self._settings.max_bytes
        too_long = BodyError(413, f"the body has more than {limit:,} bytes; send fewer rows at a time")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise too_long
        body = bytearray()
        try:
            with anyio.fail_after(self._settings.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise too_long
        except TimeoutError as error:
            raise BodyError(408, f"the body took more than {self._settings.body_seconds:g} s") from error
        return bytes(body)

    async def _scored(self, request: Request, rows: Decoded) -> NDArray[np.float32]:
        """Probabilities of rows; gives them up when the client leaves, or at the deadline."""
        if not len(rows):
            return np.empty(0, np.float32)
        submitted = self._batcher.submit(rows)
        scores = asyncio.wrap_future(submitted)
        # Behind the body, only that the client left can come.
        leaving = asyncio.ensure_future(request.receive())
        try:
            either: set[asyncio.Future[Any]] = {scores, leaving}
            deadline = self._settings.deadline_seconds
            await asyncio.wait(either, timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
            if scores.done():
                return scores.result()
            if leaving.done():
                raise ClientDisconnect
            raise OverloadedError(f"no scores after {deadline:g} s; ask again later")
        finally:
            submitted.cancel()  # at once, before the scoring thread takes it
            scores.cancel()  # or what becomes of it now would be logged as missed, values included
            leaving.cancel()


def make_app(served: ServedArtifact, batcher: Batcher, metrics: Metrics, settings: Settings) -> FastAPI:
    """The ASGI application of a server.

    Args:
        served: the artifact.
        batcher: scores by it.
        metrics: what is shown under /metrics.
        settings: limits.
    """
    # The pages for people would load scripts from elsewhere.
    app = FastAPI(title="hetegen_rec", docs_url=None, redoc_url=None)
    endpoints = Endpoints(served, batcher, metrics, settings)
    app.add_api_route("/v1/score", endpoints.score, methods=["POST"], openapi_extra=_SCORE_OPENAPI)
    app.add_api_route("/healthz", endpoints.health, methods=["GET"])
    app.add_api_route("/metrics", endpoints.show_metrics, methods=["GET"])
    if settings.reload_endpoint:
        app.add_api_route("/v1/reload", endpoints.reload, methods=["POST"])
    paths = frozenset({"/v1/score", "/healthz", "/metrics", "/v1/reload"})
    app.add_middleware(Records, metrics=metrics, paths=paths)
    return app


def _told(error: Exception) -> str:
    """The text of an error for its caller; values in it may be long, and no valid Unicode."""
    return str(error)[:_LONGEST_MESSAGE].encode("utf-8", "backslashreplace").decode()
