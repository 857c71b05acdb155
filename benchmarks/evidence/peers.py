"""Figures that were measured elsewhere, beside ours."""

from collections.abc import Iterator

from benchmarks.evidence.cells import NONE
from benchmarks.evidence.grid import Grid, Peer
from benchmarks.evidence.summary import Metric, Summary
from benchmarks.evidence.tables import Cell, Row, Table
from hetegen_rec.evaluation.tables import number

_METRICS: dict[Metric, str] = {
    ("test", "auc"): "auc",
    ("test", "gauc"): "gauc",
    ("test", "log_loss"): "log_loss",
    ("test", "slices", "cold_users", "auc"): "cold_users",
    ("test", "slices", "tail_items", "auc"): "tail_items",
}
"""Under which key of a `Peer` a metric stands."""


def peer_tables(summary: Summary, metric: Metric, lower_is_better: bool = False) -> Iterator[Table]:
    """One table, if the grid has figures of a metric: theirs, the best in bold, and ours, chosen on valid."""
    figures = {name: _figures(summary.grid, name, metric) for name in summary.data_sets}
    columns = {data_set: column for data_set, column in figures.items() if column}
    if not columns:
        return
    best = {
        data_set: (min if lower_is_better else max)(column.values()) for data_set, column in columns.items()
    }
    rows: list[Row] = [
        [name, *(_figure(column.get(name), best[data_set]) for data_set, column in columns.items())]
        for name in dict.fromkeys(name for column in columns.values() for name in column)
    ]
    if summary.grid.contest is not None:
        rows.append(["ours, chosen on valid", *(_ours(summary, name, metric) for name in columns)])
    yield Table(["copied, not measured here", *columns], rows)


def sources(grid: Grid) -> str:
    """Where the figures are from; empty without any."""
    peers = [peer for data_set in grid.data_sets.values() for peer in data_set.peers.values()]
    return "; ".join(dict.fromkeys(peer.source for peer in peers))


def _figures(grid: Grid, data_set: str, metric: Metric) -> dict[str, float]:
    found = {name: _value(peer, metric) for name, peer in grid.data_sets[data_set].peers.items()}
    return {name: value for name, value in found.items() if value is not None}


def _value(peer: Peer, metric: Metric) -> float | None:
    key = _METRICS.get(metric)
    return None if key is None else getattr(peer, key)


def _figure(value: float | None, best: float) -> Cell:
    return Cell(NONE) if value is None else Cell(number(value), value == best)


def _ours(summary: Summary, data_set: str, metric: Metric) -> str:
    contest = summary.grid.contest
    chosen = contest and summary.best_on_valid(data_set, summary.grid.members(contest.ours))
    spread = summary.spread(data_set, chosen, metric) if chosen else None
    return NONE if spread is None else number(spread.mean)
