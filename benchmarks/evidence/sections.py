"""The parts of the page, from the headline table down to failures."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.evidence import plots, words
from benchmarks.evidence.comparing import Spread
from benchmarks.evidence.records import Record
from benchmarks.evidence.slices import TITLES
from benchmarks.evidence.summary import TEST_AUC, VALID_AUC, Comparison, Metric, Summary, slice_auc
from benchmarks.evidence.tables import Cell, Table
from hetegen_rec.evaluation.plots import RELATIVE, WEIGHT, fields_over_time
from hetegen_rec.evaluation.report_sections import PlotCard
from hetegen_rec.evaluation.run_record import RunRecord, StageRecord, read_run
from hetegen_rec.evaluation.tables import NOT_DEFINED, number, percent

_NONE = "-"
_GENERATIVE = ("pretrain", "joint")


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    words: str = ""
    tables: Sequence[Table] = ()
    plots: Sequence[PlotCard] = field(default=())
    """In HTML only."""


def sections_of(summary: Summary, failed: Mapping[str, Record], out: Path) -> Iterator[Section]:
    """The parts that there is something to say for, in order."""
    if summary.data_sets:
        yield _headline(summary)
        yield _against_baseline(summary)
        yield _choice_on_valid(summary)
        yield from _other_metrics(summary)
        yield _slices(summary)
        yield _search(summary)
        yield _cost(summary)
        yield from _reconstruction(summary, out)
    if failed:
        yield _failures(failed)


def _headline(summary: Summary) -> Section:
    figure = plots.differences(summary)
    cards = [PlotCard("AUC against the baseline", figure, words.DIFFERENCES)] if figure else []
    return Section("AUC on test", words.headline(summary), [_metric_table(summary, TEST_AUC)], cards)


def _metric_table(summary: Summary, metric: Metric, lower_is_better: bool = False) -> Table:
    """One row a method, one column a data set: mean and deviation, best in bold, significance marked."""
    columns = {name: _column(summary, name, metric, lower_is_better) for name in summary.data_sets}
    rows: list[list[Cell | str]] = [
        [summary.grid.methods[method].title, *(column[method] for column in columns.values())]
        for method in summary.methods
    ]
    return Table(["method", *columns], rows)


def _column(summary: Summary, data_set: str, metric: Metric, lower_is_better: bool) -> dict[str, Cell]:
    spreads = {method: summary.spread(data_set, method, metric) for method in summary.methods}
    means = [spread.mean for spread in spreads.values() if spread is not None]
    best = (min(means) if lower_is_better else max(means)) if means else None
    comparisons = summary.comparisons(data_set, metric)
    return {
        method: _spread_cell(spread, best, comparisons.get(method), summary.grid.seeds)
        for method, spread in spreads.items()
    }


def _spread_cell(
    spread: Spread | None, best: float | None, comparison: Comparison | None, seeds: int
) -> Cell:
    if spread is None:
        return Cell(_NONE)
    text = number(spread.mean) + (f" ± {spread.deviation:.4f}" if spread.num_seeds > 1 else "")
    few = f"({spread.num_seeds} of {seeds} seeds)" if spread.num_seeds < seeds else ""
    notes = [_mark(comparison) if comparison is not None else "", few]
    return Cell(text, spread.mean == best, " ".join(note for note in notes if note))


def _mark(comparison: Comparison) -> str:
    """Which side of the baseline, once for p < 0.05, twice if it stays below after correction."""
    side = "▲" if comparison.mean > 0 else "▼"
    return side * (comparison.is_significant + comparison.stays_significant)


def _against_baseline(summary: Summary) -> Section:
    tables = [table for name in summary.data_sets if (table := _comparison_table(summary, name)).rows]
    title = f"Against {summary.grid.methods[summary.grid.baseline].title.lower()}"
    return Section(title, words.AGAINST_BASELINE, tables)


def _comparison_table(summary: Summary, data_set: str) -> Table:
    of_slices = {name: summary.comparisons(data_set, slice_auc(name)) for name in TITLES}
    rows: list[list[Cell | str]] = []
    for method, comparison in summary.comparisons(data_set, TEST_AUC).items():
        intervals = summary.intervals(data_set, method)
        above, below = (sum(bound(one) for one in intervals) for bound in (_is_above, _is_below))
        rows.append(
            [
                summary.grid.methods[method].title,
                Cell(number(comparison.mean, sign=True), note=_mark(comparison)),
                number(comparison.p_value, 3),
                number(comparison.adjusted, 3),
                f"{above} / {below} of {len(intervals)}" if intervals else NOT_DEFINED,
                percent(comparison.relative_improvement),
                *(_gain_cell(found.get(method)) for found in of_slices.values()),
            ]
        )
    heading = [data_set, "difference", "p", "p, corrected", "bootstrap above / below", "RI"]
    return Table([*heading, *(name.replace("_", " ") for name in of_slices)], rows)


def _is_above(interval: tuple[float, float]) -> bool:
    return interval[0] > 0.0


def _is_below(interval: tuple[float, float]) -> bool:
    return interval[1] < 0.0


def _gain_cell(comparison: Comparison | None) -> Cell:
    if comparison is None:
        return Cell(_NONE)
    return Cell(number(comparison.mean, sign=True), note=_mark(comparison))


def _choice_on_valid(summary: Summary) -> Section:
    tables = [_metric_table(summary, VALID_AUC), _chosen_table(summary)]
    if summary.mean_ranks:
        tables.append(_rank_table(summary))
    return Section("What validation would choose", words.CHOICE, tables)


def _chosen_table(summary: Summary) -> Table:
    rows: list[list[Cell | str]] = []
    for data_set in summary.data_sets:
        chosen = summary.best_on_valid(data_set)
        comparison = summary.comparisons(data_set, TEST_AUC).get(chosen)
        ours, base = (
            summary.spread(data_set, method, TEST_AUC) for method in (chosen, summary.grid.baseline)
        )
        cells = [number(one.mean if one else None) for one in (ours, base)]
        rows.append([data_set, summary.grid.methods[chosen].title, *cells, _gain_cell(comparison)])
    return Table(["data set", "best on valid", "its test AUC", "baseline's", "difference"], rows)


def _rank_table(summary: Summary) -> Table:
    rows: list[list[Cell | str]] = [
        [
            summary.grid.methods[method].title,
            Cell(f"{mean:.2f}", mean == min(summary.mean_ranks.values())),
            *(f"{column[method]:g}" for column in summary.ranks.values()),
        ]
        for method, mean in summary.mean_ranks.items()
    ]
    return Table(["rank by AUC on valid", "mean", *summary.ranks], rows)


def _other_metrics(summary: Summary) -> Iterator[Section]:
    for title, metric, lower_is_better, text in (
        ("GAUC on test", ("test", "gauc"), False, words.GAUC),
        ("LogLoss on test, temperature fitted on valid", ("test", "log_loss_scaled"), True, words.LOG_LOSS),
        ("LogLoss on test as it is", ("test", "log_loss"), True, ""),
    ):
        if any(summary.spread(d, m, metric) for d in summary.data_sets for m in summary.methods):
            yield Section(title, text, [_metric_table(summary, metric, lower_is_better)])


def _slices(summary: Summary) -> Section:
    tables = []
    for name, title in TITLES.items():
        table = _metric_table(summary, slice_auc(name))
        sizes = [_slice_size(summary, data_set, name) for data_set in summary.data_sets]
        tables.append(Table([title, *table.heading[1:]], [*table.rows, ["rows (clicks)", *sizes]]))
    return Section("AUC on slices of test", words.SLICES, tables)


def _slice_size(summary: Summary, data_set: str, name: str) -> str:
    for method in summary.methods:
        for record in summary.records(data_set, method):
            rows, clicks = (record.value("test", "slices", name, key) for key in ("n", "positives"))
            if rows is not None and clicks is not None:
                return f"{rows:,.0f} ({clicks:,.0f})"
    return _NONE


def _search(summary: Summary) -> Section:
    tables, seconds, num_runs = [], 0.0, 0
    for data_set in summary.data_sets:
        options = list(summary.grid.data_sets[data_set].search)
        rows: list[list[Cell | str]] = []
        for method in summary.methods:
            found = summary.search(data_set, method)
            best = max((record.selection for record in found.values()), default=None)
            cells = [
                Cell(number(found[name].selection), found[name].selection == best)
                if name in found
                else Cell(_NONE)
                for name in options
            ]
            rows.append([summary.grid.methods[method].title, *cells])
            seconds += sum(record.wall_seconds for record in found.values())
            num_runs += len(found)
        tables.append(Table([data_set, *options], rows))
    return Section("Search on valid", words.search(num_runs, seconds), tables)


def _cost(summary: Summary) -> Section:
    tables = [
        _mean_table(summary, "training, minutes", lambda record: record.seconds / 60, 1),
        _mean_table(summary, "peak memory, MiB", lambda record: record.peak_memory_mib, 0),
    ]
    if any(_passes(record) > 1.0 for record in summary.all_records):
        tables.append(_mean_table(summary, "network passes to score a row of test", _passes, 2))
    return Section("Cost of a run", words.COST, tables)


def _passes(record: Record) -> float:
    return record.value("test", "inference", "passes_per_row") or 1.0


def _mean_table(summary: Summary, title: str, value: Callable[[Record], float], digits: int) -> Table:
    rows = []
    for method in summary.methods:
        found = [summary.records(data_set, method) for data_set in summary.data_sets]
        cells = [number(statistics.mean(map(value, one)), digits) if one else _NONE for one in found]
        rows.append([summary.grid.methods[method].title, *cells])
    return Table([title, *summary.data_sets], rows)


def _reconstruction(summary: Summary, out: Path) -> Iterator[Section]:
    """How hard fields were and what weight they got, where the runs' own logs are still there."""
    tables: list[Table] = []
    cards: list[PlotCard] = []
    for data_set in summary.data_sets:
        stages = {
            summary.grid.methods[method].title: stage
            for method in summary.methods
            if (stage := _generative_stage(summary, data_set, method, out)) is not None
        }
        if stages:
            tables.append(_fields_table(data_set, stages))
            cards += _field_plots(data_set, stages)
    if tables:
        yield Section("What was reconstructed, and with what weight", words.FIELDS, tables, cards)


def _generative_stage(summary: Summary, data_set: str, method: str, out: Path) -> StageRecord | None:
    """That of the first seed."""
    records = summary.records(data_set, method)
    if not records:
        return None
    run: RunRecord = read_run(out / records[0].directory)
    found = [run.stages[name] for name in _GENERATIVE if name in run.stages]
    return found[0] if found and found[0].field_names else None


def _fields_table(data_set: str, stages: Mapping[str, StageRecord]) -> Table:
    names = next(iter(stages.values())).field_names
    rows = [[name, *(_field_cell(stage, name) for stage in stages.values())] for name in names]
    return Table([f"{data_set}: r (w)", *stages], rows)


def _field_cell(stage: StageRecord, name: str) -> str:
    relative, weight = (stage.field_series(name, measure) for measure in ("relative", "weight"))
    return f"{relative.last:.2f} ({weight.last:.2f})" if relative and weight else _NONE


def _field_plots(data_set: str, stages: Mapping[str, StageRecord]) -> Iterator[PlotCard]:
    for title, stage in stages.items():
        for measure, what in ((RELATIVE, "relative loss"), (WEIGHT, "weight")):
            figure = fields_over_time(stage, measure)
            if figure is not None:
                yield PlotCard(f"{data_set}, {title}: {what}", figure, "")


def _failures(failed: Mapping[str, Record]) -> Section:
    rows = [
        [f"{one.data_set} / {one.method} / {one.option} / seed {one.seed}", one.error]
        for one in failed.values()
    ]
    return Section("Failed runs", words.FAILED, [Table(["run", "why"], rows)])
