"""Size, load time and latency of an artifact by back end and precision, beside the eager training model.

    python -m benchmarks.export_latency --config configs/movielens_100k.yaml --stage finetune \\
        --results benchmarks/results/export_latency.md

Every artifact is made by `export` from the best checkpoint of a trained stage, past its parity gate. Latency
is that of ids to probabilities, in one process; encoding raw values is measured apart. Every repeat calls the
training model and all scorers one after another on the same rows, so that they share whatever else the
machine does; what counts are the ratios to the training model of the same repeat.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.machine import how_made
from hetegen_rec.config.export import Backend, DensePrecision, TablePrecision
from hetegen_rec.config.loading import load_config
from hetegen_rec.config.run import CLICK_STAGES, RunConfig, Stage
from hetegen_rec.data.batch import Batch
from hetegen_rec.data.cursor import Cursor
from hetegen_rec.data.raw import iter_tables, list_row_groups
from hetegen_rec.data.reader import Reader
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.export.package import PARITY_SPLIT, Exporter
from hetegen_rec.scoring.manifest import Manifest
from hetegen_rec.scoring.precision import stored_parts
from hetegen_rec.scoring.scorer import Scorer
from hetegen_rec.terminal import quiet_libraries
from hetegen_rec.training.checkpoint import CheckpointInfo
from hetegen_rec.training.setup import build_sharded, open_split
from hetegen_rec.training.stages import load_checkpoint, open_checkpoints, prepare_data

ROWS = (1, 32, 512)
_MIB = 1 << 20
_SETTINGS: tuple[tuple[TablePrecision, DensePrecision], ...] = (
    ("fp32", "fp32"),
    ("fp16", "fp32"),
    ("int8", "fp32"),
    ("int4", "fp32"),
    ("int8", "bf16"),
)
_BACKENDS: tuple[Backend, ...] = ("aten", "fbgemm", "aoti")
_TRAINING_MODEL = "training model"

Call: TypeAlias = Callable[[], object]


@dataclass
class Candidate:
    """One way to score, and what is known of it."""

    name: str
    scorer: Scorer
    manifest: Manifest
    backend: Backend
    load_seconds: float
    seconds: dict[int, list[float]] = field(default_factory=lambda: {rows: [] for rows in ROWS})
    """Of every call, by its rows."""

    @property
    def table_bytes(self) -> int:
        """Of the table files that this back end reads."""
        parts = stored_parts(self.manifest.precision, self.backend)
        return sum(
            self.manifest.files[group.files[part]].bytes for group in self.manifest.tables for part in parts
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports, measures, and writes the table; returns an exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(given)
    quiet_libraries()
    config = load_config(options.config, options.overrides)
    with start_runtime("cpu", 600) as runtime, TemporaryDirectory() as directory:
        statistics_ = prepare_data(config, runtime)
        checkpoints = open_checkpoints(config, options.stage, statistics_, runtime)
        info = checkpoints.best()
        if info is None:
            raise SystemExit(f"{checkpoints.store.location} holds no checkpoint; train that stage first")
        candidates = list(_candidates(config, options.stage, info, statistics_, runtime, Path(directory)))
        model = build_sharded(config, options.stage, statistics_, runtime)
        load_checkpoint(config, checkpoints, info, statistics_, model)
        model.dmp.eval()
        eager: dict[int, list[float]] = {rows: [] for rows in ROWS}
        for num_rows in ROWS:
            batch = _batch(config, options.stage, statistics_, runtime, num_rows)
            ids = _ids(config, candidates[0].scorer, num_rows)
            calls = [(eager[num_rows], _eager(model.dmp, batch))]
            calls += [(one.seconds[num_rows], _scoring(one.scorer, ids)) for one in candidates]
            _measure(calls, options.repeats)
        page = _page(candidates, eager, _encoding(config, candidates[0].scorer), info, given)
    print(page)
    if options.results is not None:
        options.results.write_text(page + "\n", encoding="utf-8")
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/movielens_100k.yaml")
    parser.add_argument("--stage", choices=CLICK_STAGES, default="finetune")
    parser.add_argument("--repeats", type=int, default=200, help="calls of each, half of it for 512 rows")
    parser.add_argument("--results", type=Path, help="Markdown file to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def _candidates(
    config: RunConfig,
    stage: Stage,
    info: CheckpointInfo,
    statistics_: Statistics,
    runtime: Runtime,
    directory: Path,
) -> Iterator[Candidate]:
    """Every back end at every precision, exported and loaded."""
    for tables, dense in _SETTINGS:
        settings = {"backends": _BACKENDS, "tables": tables, "dense": dense}
        one = config.model_copy(update={"export": config.export.model_copy(update=settings)})

        def open_rows(split: Any, one: RunConfig = one) -> Reader:
            return open_split(one, split, statistics_, runtime, stage=stage)

        path = directory / f"{tables}-{dense}"
        manifest = Exporter(one, stage, info, statistics_, runtime, open_rows).write(path)
        for backend in _BACKENDS:
            start = time.perf_counter()
            scorer = Scorer.load(path, backend=backend)
            seconds = time.perf_counter() - start
            yield Candidate(f"{backend}, {tables}, {dense}", scorer, manifest, backend, seconds)


def _batch(
    config: RunConfig, stage: Stage, statistics_: Statistics, runtime: Runtime, num_rows: int
) -> Batch:
    train = config.train.model_copy(update={"eval_batch_size": num_rows})
    sized = config.model_copy(update={"train": train})
    reader = open_split(sized, PARITY_SPLIT, statistics_, runtime, stage=stage)
    return next(iter(reader.epoch(Cursor())))


def _ids(config: RunConfig, scorer: Scorer, num_rows: int) -> NDArray[np.int64]:
    group = list_row_groups(config.data.raw_paths(PARITY_SPLIT))[0]
    return scorer.ids(next(iter_tables(group, config.features, labelled=False)).slice(0, num_rows))


def _eager(model: torch.nn.Module, batch: Batch) -> Call:
    def call() -> object:
        with torch.no_grad():
            return model(batch)[1].logits.sigmoid()

    return call


def _scoring(scorer: Scorer, ids: NDArray[np.int64]) -> Call:
    return lambda: scorer.score_ids(ids)


def _measure(calls: list[tuple[list[float], Call]], repeats: int) -> None:
    for repeat in range(repeats + 3):
        for seconds, call in calls:
            start = time.perf_counter()
            call()
            if repeat >= 3:  # the first ones make buffers
                seconds.append(time.perf_counter() - start)


def _encoding(config: RunConfig, scorer: Scorer) -> dict[int, float]:
    """Median seconds of encoding raw rows, by their number."""
    group = list_row_groups(config.data.raw_paths(PARITY_SPLIT))[0]
    table = next(iter_tables(group, config.features, labelled=False))
    medians = {}
    for num_rows in ROWS:
        rows, seconds = table.slice(0, num_rows), list[float]()
        _measure([(seconds, lambda rows=rows: scorer.ids(rows))], 30)  # type: ignore[misc]
        medians[num_rows] = statistics.median(seconds)
    return medians


_HOW = """\
Ids to probabilities in one process; times in ms. `faster` is the median over the repeats of the training
model's time divided by the scorer's, of calls side by side. Sizes in MiB, of what the back end reads. `load`
reads every file once and compares checksums."""


def _page(
    candidates: list[Candidate],
    eager: dict[int, list[float]],
    encoding: dict[int, float],
    info: CheckpointInfo,
    arguments: Sequence[str],
) -> str:
    columns = ["back end, tables, network", "tables", "graph", "load", "AUC", "greatest difference"]
    for rows in ROWS:
        columns += [f"{rows}: p50", "p99", "faster"]
    columns.append("rows/s at 512")
    first = candidates[0].manifest
    made_of = f"{first.name}, {first.stage}, step {info.step}, checkpoint of {info.world_size} ranks"
    encoded = ", ".join(f"{1e3 * encoding[rows]:.2f} ms for {rows}" for rows in ROWS)
    return "\n".join(
        [
            "# Artifacts: size, load time and latency",
            "",
            f"{made_of}; {torch.get_num_threads()} threads.",
            how_made("benchmarks.export_latency", arguments),
            "",
            _HOW,
            "",
            f"| {' | '.join(columns)} |",
            "|---" * len(columns) + "|",
            _row_of_training_model(eager),
            *(_row(one, eager) for one in candidates),
            "",
            f"Encoding raw rows comes on top, for every back end alike: {encoded}.",
        ]
    )


def _row_of_training_model(eager: dict[int, list[float]]) -> str:
    cells = [_TRAINING_MODEL, *["-"] * 5]
    for rows in ROWS:
        cells += [_ms(statistics.median(eager[rows])), _ms(_p99(eager[rows])), "1.0"]
    cells.append(f"{512 / statistics.median(eager[512]):,.0f}")
    return f"| {' | '.join(cells)} |"


def _row(one: Candidate, eager: dict[int, list[float]]) -> str:
    found = one.manifest.parity[one.backend]
    graph = one.manifest.files[one.manifest.backends[one.backend].file].bytes
    cells = [one.name, f"{one.table_bytes / _MIB:.3f}", f"{graph / _MIB:.2f}", f"{one.load_seconds:.2f} s"]
    cells += [f"{found['auc']:.5f}", f"{found['greatest_difference']:.0e}"]
    for rows in ROWS:
        ratios = [slow / fast for slow, fast in zip(eager[rows], one.seconds[rows], strict=True)]
        cells += [_ms(statistics.median(one.seconds[rows])), _ms(_p99(one.seconds[rows]))]
        cells.append(f"{statistics.median(ratios):.1f}")
    cells.append(f"{512 / statistics.median(one.seconds[512]):,.0f}")
    return f"| {' | '.join(cells)} |"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _p99(seconds: list[float]) -> float:
    return float(np.quantile(seconds, 0.99))


if __name__ == "__main__":
    sys.exit(main())
