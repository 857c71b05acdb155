"""The artifact that is served: loaded once, and replaced while it scores."""

import logging
import threading
from pathlib import Path
from typing import Any, TypeAlias

from hetegen_rec.config.export import Backend, ScoringStrategy
from hetegen_rec.scoring.errors import ArtifactError
from hetegen_rec.scoring.scorer import Scorer
from hetegen_rec.serving.metrics import Metrics

logger = logging.getLogger(__name__)

_Fingerprint: TypeAlias = tuple[tuple[str, int, int, int], ...]
"""Of each file: its path, inode, time of its last change in nanoseconds, and size in bytes."""


class ServedArtifact:
    """A path, and the scorer of the artifact that was last loaded from it without a fault."""

    def __init__(
        self,
        path: str | Path,
        metrics: Metrics,
        *,
        backend: Backend | None = None,
        strategy: ScoringStrategy = "plain",
        verify: bool = True,
    ) -> None:
        """Loads the artifact.

        Args:
            path: its directory; another artifact may take its place at any time.
            metrics: told of every artifact.
            backend: to score by; default: the fastest that can run here.
            strategy: that it must have.
            verify: compare checksums at each load (see `Scorer.load`).

        Raises:
            ArtifactError: it cannot be used.
        """
        self._path, self._metrics = Path(path), metrics
        self._backend, self._strategy, self._verify = backend, strategy, verify
        self._loading = threading.Lock()
        self._asked = threading.Event()
        self._watcher: threading.Thread | None = None
        self._closed = False
        self._seen, self._scorer = self._load()
        metrics.show_artifact(self._scorer)

    @property
    def scorer(self) -> Scorer:
        """The one to score by now."""
        return self._scorer

    def reload(self) -> Scorer:
        """Loads what stands at the path and scores by it from then on; meanwhile the earlier one does.

        Raises:
            ArtifactError: it cannot be used; the earlier one goes on.
        """
        with self._loading:
            try:
                self._seen, scorer = self._load()
            except ArtifactError as error:
                self._metrics.reloads.labels("failed").inc()
                logger.error("not reloaded, the earlier artifact goes on: %s", error)
                raise
            self._scorer = scorer
            self._metrics.reloads.labels("loaded").inc()
            self._metrics.show_artifact(scorer)
            logger.info("scores by %s from now on", describe(scorer))
            return scorer

    def ask_reload(self) -> None:
        """Has the watching thread reload; may be called by a handler of signals."""
        self._asked.set()

    def watch(self, seconds: float) -> None:
        """Starts a thread that reloads when it is asked to, and when another artifact stands at the path.

        Args:
            seconds: between two looks at the path; 0: only when asked.
        """
        self._watcher = threading.Thread(target=self._watch, args=(seconds,), name="watching", daemon=True)
        self._watcher.start()

    def close(self) -> None:
        """Ends the watching thread."""
        self._closed = True
        self._asked.set()
        if self._watcher is not None:
            self._watcher.join()

    def _watch(self, seconds: float) -> None:
        before = self._seen
        while True:
            asked = self._asked.wait(seconds or None)
            self._asked.clear()
            if self._closed:
                return
            now = _fingerprint(self._path)
            # Two equal looks: files that are still being copied to the path are let come in peace.
            settled = now == before and now != ()
            before = now
            if asked or (settled and now != self._seen):
                self._seen = now  # what is broken is not tried again until it changes
                try:
                    self.reload()
                except ArtifactError:
                    continue  # told by `reload`

    def _load(self) -> tuple[_Fingerprint, Scorer]:
        """A scorer that works, and the files that it was made of."""
        before = _fingerprint(self._path)
        try:
            scorer = Scorer.load(self._path, backend=self._backend, verify=self._verify)
            # A row of missing values. The first call of a network is the slowest, and the first by a strategy
            # reads files, which may be others later.
            scorer.score([{}], self._strategy)
        except ArtifactError:
            raise
        except Exception as error:  # files that pass their checksums can still be none that torch reads
            raise ArtifactError(f"{self._path}: it cannot be loaded: {error}; export it again") from error
        if _fingerprint(self._path) != before:
            raise ArtifactError(f"{self._path}: it changed while it was read")
        return before, scorer


def describe(scorer: Scorer) -> str:
    """An artifact in a few words."""
    manifest = scorer.artifact.manifest
    return f"{manifest.name} {manifest.stage} step {manifest.step} ({scorer.backend}, {manifest.precision})"


def identity(scorer: Scorer) -> dict[str, Any]:
    """What tells an artifact from others, as plain values."""
    manifest = scorer.artifact.manifest
    named = {key: getattr(manifest, key) for key in ("name", "stage", "step", "created", "precision")}
    return {**named, "backend": scorer.backend}


def _fingerprint(root: Path) -> _Fingerprint:
    """Changes when a file below a directory is replaced or written; empty while there is none."""
    found = []
    try:
        for path in sorted(root.rglob("*")):
            stat = path.stat()
            found.append((str(path), stat.st_ino, stat.st_mtime_ns, stat.st_size))
    except OSError:  # replaced just now
        return ()
    return tuple(found)
