"""How numbers of the summary stand in tables."""

from collections.abc import Callable, Collection, Iterator, Mapping

from benchmarks.evidence.comparing import Spread
from benchmarks.evidence.summary import Comparison, Metric, Summary
from benchmarks.evidence.tables import Block, Cell, Row, Table
from hetegen_rec.evaluation.significance import Interval
from hetegen_rec.evaluation.tables import NOT_DEFINED, number

NONE = "-"


def metric_table(summary: Summary, metric: Metric, lower_is_better: bool = False) -> Table:
    """One row a method, one column a data set: mean and deviation, best in bold, significance marked."""
    columns = {name: _column(summary, name, metric, lower_is_better) for name in summary.data_sets}

    def row(method: str) -> Row:
        return [summary.title(method), *(column[method] for column in columns.values())]

    return Table(["method", *columns], list(in_groups(summary, summary.methods, row)))


def in_groups(summary: Summary, methods: Collection[str], row: Callable[[str], Row]) -> Iterator[Row | Block]:
    """A row a method, group after group, each under its title; all below each other without groups."""
    if not summary.grid.groups:
        yield from map(row, methods)
    for group, title in summary.grid.groups.items():
        members = [method for method in methods if summary.grid.methods[method].group == group]
        if members:
            yield Block(title)
            yield from map(row, members)


def _column(summary: Summary, data_set: str, metric: Metric, lower_is_better: bool) -> Mapping[str, Cell]:
    spreads = {method: summary.spread(data_set, method, metric) for method in summary.methods}
    means = [spread.mean for spread in spreads.values() if spread is not None]
    best = (min(means) if lower_is_better else max(means)) if means else None
    comparisons = summary.comparisons(data_set, metric)
    return {
        method: _metric_cell(spread, best, comparisons.get(method), summary.grid.seeds_of(method))
        for method, spread in spreads.items()
    }


def _metric_cell(
    spread: Spread | None, best: float | None, comparison: Comparison | None, seeds: int
) -> Cell:
    if spread is None:
        return Cell(NONE)
    notes = [mark(comparison) if comparison is not None else "", few_seeds(spread, seeds)]
    return Cell(spread_text(spread), spread.mean == best, " ".join(note for note in notes if note))


def few_seeds(spread: Spread, seeds: int) -> str:
    """How many seeds there are, if not all."""
    return f"({spread.num_seeds} of {seeds} seeds)" if spread.num_seeds < seeds else ""


def spread_text(spread: Spread | None) -> str:
    """Mean, and deviation if there is one."""
    if spread is None:
        return NONE
    return number(spread.mean) + (f" ± {spread.deviation:.4f}" if spread.num_seeds > 1 else "")


def mark(comparison: Comparison) -> str:
    """Which side of the other method, once for p < 0.05, twice if it stays below after correction."""
    side = "▲" if comparison.mean > 0 else "▼"
    return side * (comparison.is_significant + comparison.stays_significant)


def gain_cell(comparison: Comparison | None) -> Cell:
    """Mean difference and its mark."""
    if comparison is None:
        return Cell(NONE)
    return Cell(number(comparison.mean, sign=True), note=mark(comparison))


def p_cells(comparison: Comparison) -> list[str]:
    """p and corrected p."""
    return [_p_text(comparison.p_value), _p_text(comparison.adjusted)]


def _p_text(p_value: float | None) -> str:
    return "< 0.001" if p_value is not None and p_value < 0.001 else number(p_value, 3)


def interval_text(intervals: Collection[Interval]) -> str:
    """How many intervals lie above and below zero."""
    if not intervals:
        return NOT_DEFINED
    above, below = sum(one.low > 0.0 for one in intervals), sum(one.high < 0.0 for one in intervals)
    return f"{above} / {below} of {len(intervals)}"
