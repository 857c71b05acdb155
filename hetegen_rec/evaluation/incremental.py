"""What models that followed a log period after period scored on the period after: file, table and page."""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from hetegen_rec.config.incremental import Way
from hetegen_rec.evaluation import plots
from hetegen_rec.evaluation.page import html_page
from hetegen_rec.evaluation.page import plots as plots_html
from hetegen_rec.evaluation.report_sections import drawn_cards
from hetegen_rec.evaluation.tables import number
from hetegen_rec.files import write_whole

RESULTS_FILE = "incremental.json"
PAGE_FILE = "incremental.html"
WAY_TITLES: dict[Way, str] = {"finetune": "Fine-tuned", "retrain": "Retrained", "fesail": "FeSAIL"}

_METRICS = ("n", "positives", "auc", "log_loss", "normalized_entropy", "gauc", "calibration")
_NOTE = (
    "Every model is tested on the period after the newest one that it was trained on. The line of the first "
    "tested period is that of the first model, with which all ways begin; means are over the others. Seconds "
    "are those of training. One seed: the spread between seeds may be as large as the differences."
)
_AVERAGED = ("auc", "log_loss", "gauc", "seconds")
_HEADINGS = ("AUC", "LogLoss", "seconds")


@dataclass(frozen=True)
class UpdateResult:
    """One model, and what it scored."""

    way: Way | None
    """None for the first model, from which all ways go on."""
    trained_up_to: int
    """The newest period that it was trained on."""
    tested_on: int
    """The period after."""
    train_rows: int
    """Rows that it was trained on since the model before, replayed ones among them."""
    steps: int
    seconds: float
    """That its training took, validation included."""
    metrics: dict[str, Any]
    """Of the tested period's rows; None where a metric is not defined."""
    replay: dict[str, int] | None = None
    """`fesail`: what was replayed."""

    @classmethod
    def of(
        cls,
        way: Way | None,
        trained_up_to: int,
        train_rows: int,
        done: Mapping[str, Any],
        tested: Mapping[str, Any],
        replay: dict[str, int] | None = None,
    ) -> "UpdateResult":
        """From what a finished stage left.

        Args:
            way: see there.
            trained_up_to: see there.
            train_rows: see there.
            done: its `done.json`.
            tested: the results of split `test` in its `evaluation.json`.
            replay: see there.
        """
        metrics = {name: tested.get(name) for name in _METRICS}
        return cls(
            way, trained_up_to, trained_up_to + 1, train_rows, done["steps"], done["seconds"], metrics, replay
        )


@dataclass
class SequenceResults:
    """The results of a sequence as far as it has come."""

    run: str
    stage: str
    seed: int
    ways: Sequence[Way]
    periods: Sequence[Mapping[str, int]]
    """What each period is: number, times and rows."""
    updates: list[UpdateResult] = field(default_factory=list)

    @property
    def tested_periods(self) -> list[int]:
        """Numbers of the periods on which any model was tested, ascending."""
        return sorted({one.tested_on for one in self.updates})

    def result(self, way: Way, tested_on: int) -> UpdateResult | None:
        """A way's model that was tested on a period: the first model serves every way."""
        found = (one for one in self.updates if one.tested_on == tested_on and one.way in (way, None))
        return next(found, None)

    def means(self) -> dict[Way, dict[str, float | None]]:
        """By way, the mean over the periods behind the first model's that all ways were tested on.

        A metric that is not defined in one of these periods has no mean.
        """
        own = {way: {one.tested_on: one for one in self.updates if one.way == way} for way in self.ways}
        common = sorted(set.intersection(*(set(tested) for tested in own.values())))
        return {
            way: {name: _mean([_value(tested[period], name) for period in common]) for name in _AVERAGED}
            for way, tested in own.items()
        }

    def write(self, directory: Path) -> Path:
        """Writes incremental.json in one piece."""
        path = directory / RESULTS_FILE
        content = asdict(self) | {"means": self.means()}
        write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        return path


def results_table(results: SequenceResults) -> Table:
    """One line a tested period, three columns a way, and the means."""
    table = Table(title=f"{results.run}: each model tested on the period after", title_justify="left")
    table.add_column("period")
    table.add_column("rows", justify="right")
    for way in results.ways:
        for heading in _HEADINGS:
            table.add_column(f"{way}\n{heading}", justify="right")
    for row in _rows(results):
        table.add_row(*row)
    return table


def write_page(results: SequenceResults, directory: Path) -> Path:
    """Writes incremental.html, which needs no other file."""
    path = directory / PAGE_FILE
    cards = drawn_cards(
        ("AUC", _figure(results, "auc", "AUC"), "Higher is better."),
        ("LogLoss", _figure(results, "log_loss", "log loss"), "Lower is better."),
    )
    section = f"<section>{_html_table(results)}\n{plots_html(cards)}</section>"
    span = f"{len(results.periods)} periods, stage {results.stage}, seed {results.seed}"
    header = f'<p class="verdict">{html.escape(span)}</p>'
    footer = f"<footer>{html.escape(_NOTE)}</footer>"
    write_whole(path, html_page(results.run, "training over periods", header, f"{section}\n{footer}"))
    return path


def _rows(results: SequenceResults) -> Iterator[list[str]]:
    for period in results.tested_periods:
        found = [results.result(way, period) for way in results.ways]
        rows = next(one.metrics["n"] for one in found if one is not None)
        cells = [cell for one in found for cell in _cells(one)]
        first = any(one is not None and one.way is None for one in found)
        yield [f"{period} (first model)" if first else str(period), f"{rows:,}", *cells]
    means = results.means()
    cells = [
        number(means[way][name], digits)
        for way in results.ways
        for name, digits in (("auc", 4), ("log_loss", 4), ("seconds", 1))
    ]
    yield ["mean", "", *cells]


def _cells(one: UpdateResult | None) -> list[str]:
    if one is None:
        return ["", "", ""]
    return [number(one.metrics["auc"]), number(one.metrics["log_loss"]), f"{one.seconds:.1f}"]


def _html_table(results: SequenceResults) -> str:
    titles = ["tested period", "rows"]
    titles += [f"{WAY_TITLES[way]}<br>{heading}" for way in results.ways for heading in _HEADINGS]
    lines = [[f"<th>{title}</th>" for title in titles]]
    lines += [[f"<td>{html.escape(cell)}</td>" for cell in row] for row in _rows(results)]
    rows = "".join(f"<tr>{''.join(cells)}</tr>" for cells in lines)
    return f'<div class="card"><table>{rows}</table></div>'


def _figure(results: SequenceResults, metric: str, label: str) -> Figure | None:
    lines: dict[str, dict[int, float]] = {}
    for way in results.ways:
        found = {period: results.result(way, period) for period in results.tested_periods}
        values = {period: _value(one, metric) for period, one in found.items() if one is not None}
        lines[WAY_TITLES[way]] = {period: value for period, value in values.items() if value is not None}
    return plots.over_periods(lines, label)


def _value(one: UpdateResult, name: str) -> float | None:
    value: float | None = one.seconds if name == "seconds" else one.metrics[name]
    return value


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
