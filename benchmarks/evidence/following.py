"""What models that followed a log scored, way by way."""

import statistics
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.evidence import words
from benchmarks.evidence.cells import NONE, few_seeds, gain_cell, p_cells, spread_text
from benchmarks.evidence.comparing import spread_of
from benchmarks.evidence.grid import Incremental
from benchmarks.evidence.records import Record
from benchmarks.evidence.summary import Comparison, Summary, compare_paired, corrected
from benchmarks.evidence.tables import Cell, Row, Section, Table
from hetegen_rec.config.incremental import Way
from hetegen_rec.evaluation.incremental import WAY_TITLES
from hetegen_rec.evaluation.tables import number


def following_sections(summary: Summary) -> Iterator[Section]:
    """One section, if a log was followed."""
    section = summary.grid.incremental
    if section is None:
        return
    followed = {name: records for name in section.data_sets if (records := summary.sequences(name))}
    tables = [
        table
        for name, records in followed.items()
        for table in (_way_table(name, records, section), _period_table(name, records))
    ]
    if tables:
        yield Section("Following a log", words.following(WAY_TITLES[section.baseline]), tables=tables)


def _way_table(data_set: str, records: Sequence[Record], section: Incremental) -> Table:
    """One row a way: AUC, how sure its difference is, and what an update costs."""
    ways = _ways(records)
    comparisons = _comparisons(records, section.baseline)
    spreads = {way: spread_of(list(_values(records, way, "auc").values())) for way in ways}
    best = max((spread.mean for spread in spreads.values() if spread is not None), default=None)

    def row(way: Way) -> Row:
        spread, comparison = spreads[way], comparisons.get(way)
        auc = Cell(
            spread_text(spread),
            spread is not None and spread.mean == best,
            few_seeds(spread, section.seeds) if spread is not None else "",
        )
        others = [
            spread_text(spread_of(list(_values(records, way, metric).values())))
            for metric in ("log_loss", "gauc")
        ]
        costs = [f"{_mean(records, way, 'rows'):,.0f}", f"{_mean(records, way, 'seconds'):.1f}"]
        compared = p_cells(comparison) if comparison is not None else [NONE, NONE]
        return [WAY_TITLES[way], auc, gain_cell(comparison), *compared, *others, *costs]

    heading = ["AUC", "difference", "p", "p, corrected", "LogLoss", "GAUC", "rows", "seconds"]
    return Table([data_set, *heading], [row(way) for way in ways])


def _period_table(data_set: str, records: Sequence[Record]) -> Table:
    """AUC by tested period, on average over seeds."""
    periods = list(records[0].ways[_ways(records)[0]]["auc_by_period"])

    def row(way: Way) -> Row:
        by_seed = [record.ways[way]["auc_by_period"] for record in records]
        return [WAY_TITLES[way], *(number(_mean_of([one[period] for one in by_seed])) for period in periods)]

    return Table([f"{data_set}: AUC on period", *periods], [row(way) for way in _ways(records)])


def _comparisons(records: Sequence[Record], baseline: Way) -> Mapping[str, Comparison]:
    """AUC of the other ways against one, corrected for their number."""
    base = _values(records, baseline, "auc")
    others = [way for way in _ways(records) if way != baseline]
    return corrected({way: compare_paired(_values(records, way, "auc"), base) for way in others})


def _ways(records: Sequence[Record]) -> list[Way]:
    return [way for way in WAY_TITLES if way in records[0].ways]


def _values(records: Sequence[Record], way: Way, name: str) -> dict[int, float]:
    """A result by seed, where it is defined."""
    found = {record.seed: record.ways[way][name] for record in records}
    return {seed: value for seed, value in found.items() if value is not None}


def _mean(records: Sequence[Record], way: Way, name: str) -> float:
    """Of something that every run has."""
    return statistics.mean(_values(records, way, name).values())


def _mean_of(values: Sequence[float | None]) -> float | None:
    """None if one of them is not defined, or there are none."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None
