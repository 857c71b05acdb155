"""What ways to score, other than one pass, gain with the same trained models, and what they cost."""

import statistics
from collections.abc import Callable, Iterator

from benchmarks.evidence import words
from benchmarks.evidence.cells import gain_cell, interval_text, p_cells, spread_text
from benchmarks.evidence.records import Record
from benchmarks.evidence.summary import TEST_AUC, Summary, corrected
from benchmarks.evidence.tables import Row, Section, Table
from hetegen_rec.evaluation.tables import number


def passes(record: Record) -> float:
    """Passes of the network to score a row of test, on average."""
    return record.value("test", "inference", "passes_per_row") or 1.0


def _time_multiple(record: Record) -> float:
    return record.value("test", "inference", "time_multiple") or 1.0


def strategy_sections(summary: Summary) -> Iterator[Section]:
    """One section, if a method has run that only scores."""
    tables = [table for name in summary.data_sets if (table := _table(summary, name)).rows]
    if tables:
        yield Section("Test-time strategies", words.STRATEGIES, tables=tables)


def _table(summary: Summary, data_set: str) -> Table:
    base_of = {m: base for m in summary.methods if (base := summary.grid.methods[m].of) is not None}
    comparisons = corrected(
        {method: summary.compare(data_set, method, base, TEST_AUC) for method, base in base_of.items()}
    )
    rows: list[Row] = []
    for method, comparison in comparisons.items():
        base = base_of[method]
        rows.append(
            [
                summary.title(method),
                summary.title(base),
                *(spread_text(summary.spread(data_set, one, TEST_AUC)) for one in (base, method)),
                gain_cell(comparison),
                *p_cells(comparison),
                interval_text(summary.intervals(data_set, method, base)),
                _mean(summary, data_set, method, passes),
                _mean(summary, data_set, method, _time_multiple),
            ]
        )
    scored = ["model", "plain AUC", "AUC", "difference", "p", "p, corrected", "bootstrap above / below"]
    return Table([data_set, *scored, "passes a row", "time"], rows)


def _mean(summary: Summary, data_set: str, method: str, value: Callable[[Record], float]) -> str:
    return number(statistics.mean(map(value, summary.records(data_set, method))), 2)
