"""What a server counts, as Prometheus reads it."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from hetegen_rec.scoring.scorer import Scorer

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ROWS = tuple(2.0**exponent for exponent in range(13))


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "hetegen_requests_total", "Requests answered.", ["path", "code"], registry=self._registry
        )
        self.request_seconds = Histogram(
            "hetegen_request_seconds",
            "From the first byte of a request to its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.rows = Counter("hetegen_rows_total", "Rows scored.", registry=self._registry)
        self.dropped = Counter(
            "hetegen_dropped_requests_total",
            "Requests that were not scored as nobody waited any more.",
            registry=self._registry,
        )
        self.batch_rows = Histogram(
            "hetegen_batch_rows", "Rows scored together.", buckets=_ROWS, registry=self._registry
        )
        self.batch_seconds = Histogram(
            "hetegen_batch_seconds",
            "Encoding and scoring of a batch.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._queue_rows = Gauge("hetegen_queue_rows", "Rows that wait.", registry=self._registry)
        self.reloads = Counter(
            "hetegen_reloads_total",
            "Attempts to load another artifact, `loaded` or `failed`.",
            ["result"],
            registry=self._registry,
        )
        for result in ("loaded", "failed"):
            self.reloads.labels(result)
        self._artifact = Gauge(
            "hetegen_artifact_info",
            "The artifact that scores.",
            ["name", "stage", "step", "created", "backend", "precision"],
            registry=self._registry,
        )
        self._loaded = Gauge(
            "hetegen_artifact_loaded_timestamp_seconds",
            "When the artifact that scores was loaded.",
            registry=self._registry,
        )

    def watch_queue(self, rows: Callable[[], int]) -> None:
        """Names what tells the rows that wait."""
        self._queue_rows.set_function(rows)

    def show_artifact(self, scorer: Scorer) -> None:
        """Says which artifact scores from now on."""
        manifest = scorer.artifact.manifest
        self._artifact.clear()
        self._artifact.labels(
            name=manifest.name,
            stage=manifest.stage,
            step=manifest.step,
            created=manifest.created,
            backend=scorer.backend,
            precision=manifest.precision,
        ).set(1)
        self._loaded.set_to_current_time()

    def exposition(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
