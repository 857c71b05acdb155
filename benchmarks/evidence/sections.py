"""The parts of the page, from the answer down to failures."""

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from benchmarks.evidence import plots, words
from benchmarks.evidence.cells import (
    NONE,
    gain_cell,
    in_groups,
    interval_text,
    mark,
    metric_table,
    p_cells,
    spread_text,
)
from benchmarks.evidence.contest import contest_sections
from benchmarks.evidence.diagnostics import diagnostic_sections
from benchmarks.evidence.following import following_sections
from benchmarks.evidence.peers import peer_tables
from benchmarks.evidence.records import Record
from benchmarks.evidence.slices import TITLES
from benchmarks.evidence.strategies import passes, strategy_sections
from benchmarks.evidence.summary import TEST_AUC, VALID_AUC, Metric, Summary, slice_auc
from benchmarks.evidence.tables import Cell, Row, Section, Table
from hetegen_rec.evaluation.report_sections import PlotCard
from hetegen_rec.evaluation.tables import number, percent


def sections_of(summary: Summary, failed: Mapping[str, Record], out: Path) -> Iterator[Section]:
    """The parts that there is something to say for, in order."""
    if summary.data_sets:
        yield from contest_sections(summary)
        yield _headline(summary)
        yield _against_baseline(summary)
        yield from strategy_sections(summary)
        yield _choice_on_valid(summary)
        yield from _other_metrics(summary)
        yield _slices(summary)
    yield from following_sections(summary)
    if summary.data_sets:
        yield _search(summary)
        yield _cost(summary)
        yield from diagnostic_sections(summary, out)
    if failed:
        yield _failures(failed)


def _headline(summary: Summary) -> Section:
    figure = plots.differences(summary)
    cards = [PlotCard("AUC against the baseline", figure, words.DIFFERENCES)] if figure else []
    tables = [metric_table(summary, TEST_AUC), *peer_tables(summary, TEST_AUC)]
    return Section("AUC on test", words.headline(summary), tables=tables, plots=cards)


def _against_baseline(summary: Summary) -> Section:
    tables = [table for name in summary.data_sets if (table := _comparison_table(summary, name)).rows]
    title = f"Against “{summary.title(summary.grid.baseline)}”"
    return Section(title, words.AGAINST_BASELINE, tables=tables)


def _comparison_table(summary: Summary, data_set: str) -> Table:
    comparisons = summary.comparisons(data_set, TEST_AUC)
    of_slices = {name: summary.comparisons(data_set, slice_auc(name)) for name in TITLES}

    def row(method: str) -> Row:
        comparison = comparisons[method]
        return [
            summary.title(method),
            Cell(number(comparison.mean, sign=True), note=mark(comparison)),
            *p_cells(comparison),
            interval_text(summary.intervals(data_set, method, summary.grid.baseline)),
            percent(comparison.relative_improvement),
            *(gain_cell(found.get(method)) for found in of_slices.values()),
        ]

    heading = [data_set, "difference", "p", "p, corrected", "bootstrap above / below", "RI"]
    rows = list(in_groups(summary, comparisons, row))
    return Table([*heading, *(name.replace("_", " ") for name in of_slices)], rows)


def _choice_on_valid(summary: Summary) -> Section:
    """What follows from valid alone: for the side of the contest that is ours, or for all."""
    contest = summary.grid.contest
    candidates = summary.grid.members(contest.ours) if contest else summary.methods
    rankings = {"rank by AUC on valid": candidates}
    rankings.update({f"{choice}: rank on valid": names for choice, names in summary.grid.choices.items()})
    tables = [metric_table(summary, VALID_AUC), _chosen_table(summary, candidates)]
    for title, methods in rankings.items():
        tables += _rank_tables(summary, title, methods)
    return Section("What validation would choose", words.CHOICE, tables=tables)


def _chosen_table(summary: Summary, candidates: Collection[str]) -> Table:
    rows: list[Row] = []
    for data_set in summary.data_sets:
        chosen = summary.best_on_valid(data_set, candidates)
        if chosen is None:
            continue
        base = summary.grid.baseline
        texts = [spread_text(summary.spread(data_set, method, TEST_AUC)) for method in (chosen, base)]
        comparison = summary.comparisons(data_set, TEST_AUC).get(chosen)
        rows.append([data_set, summary.title(chosen), *texts, gain_cell(comparison)])
    base_title = summary.title(summary.grid.baseline)
    return Table(["data set", "best on valid", "its test AUC", f"that of {base_title}", "difference"], rows)


def _rank_tables(summary: Summary, title: str, methods: Collection[str]) -> Iterator[Table]:
    """One table, if there are methods to rank."""
    ranking = summary.ranking(methods)
    if len(ranking.means) < 2:
        return
    best = min(ranking.means.values())
    rows: list[Row] = [
        [
            summary.title(method),
            Cell(f"{mean:.2f}", mean == best),
            *(f"{column[method]:g}" for column in ranking.by_data_set.values()),
        ]
        for method, mean in ranking.means.items()
    ]
    yield Table([title, "mean", *ranking.by_data_set], rows)


def _other_metrics(summary: Summary) -> Iterator[Section]:
    found: list[tuple[str, Metric, bool, str]] = [
        ("GAUC on test", ("test", "gauc"), False, words.GAUC),
        ("LogLoss on test, temperature fitted on valid", ("test", "log_loss_scaled"), True, words.LOG_LOSS),
        ("LogLoss on test as it is", ("test", "log_loss"), True, ""),
    ]
    for title, metric, lower_is_better, text in found:
        if any(summary.spread(d, m, metric) for d in summary.data_sets for m in summary.methods):
            peers = peer_tables(summary, metric, lower_is_better)
            yield Section(title, text, tables=[metric_table(summary, metric, lower_is_better), *peers])


def _slices(summary: Summary) -> Section:
    tables = []
    for name, title in TITLES.items():
        table = metric_table(summary, slice_auc(name))
        sizes = [_slice_size(summary, data_set, name) for data_set in summary.data_sets]
        tables.append(Table([title, *table.heading[1:]], [*table.rows, ["rows (clicks)", *sizes]]))
        tables += peer_tables(summary, slice_auc(name))
    return Section("AUC on slices of test", words.SLICES, tables=tables)


def _slice_size(summary: Summary, data_set: str, name: str) -> str:
    for method in summary.methods:
        for record in summary.records(data_set, method):
            rows, clicks = (record.value("test", "slices", name, key) for key in ("n", "positives"))
            if rows is not None and clicks is not None:
                return f"{rows:,.0f} ({clicks:,.0f})"
    return NONE


def _search(summary: Summary) -> Section:
    found = {
        data_set: {m: summary.search(data_set, m) for m in summary.methods if not summary.grid.methods[m].of}
        for data_set in summary.data_sets
    }
    tables = [_search_table(summary, data_set, searched) for data_set, searched in found.items()]
    records = {r.run: r for searched in found.values() for one in searched.values() for r in one.values()}
    seconds = sum(record.wall_seconds for record in records.values())
    return Section("Search on valid", words.search(len(records), seconds), tables=tables)


def _search_table(summary: Summary, data_set: str, searched: Mapping[str, Mapping[str, Record]]) -> Table:
    options = list(summary.grid.data_sets[data_set].search)

    def row(method: str) -> Row:
        found = {option: record.selection for option, record in searched[method].items()}
        best = max(found.values())
        cells = [
            Cell(number(found[name]), found[name] == best) if name in found else NONE for name in options
        ]
        return [summary.title(method), *cells]

    tried = [method for method, found in searched.items() if found]
    return Table([data_set, *options], list(in_groups(summary, tried, row)))


def _cost(summary: Summary) -> Section:
    training = [method for method in summary.methods if not summary.grid.methods[method].of]
    tables = [
        _mean_table(summary, "CPU time, minutes", training, lambda record: record.cpu_seconds / 60, 1),
        _mean_table(summary, "peak memory, MiB", training, lambda record: record.peak_memory_mib, 0),
    ]
    if any(passes(record) > 1.0 for record in summary.all_records):
        title = "network passes to score a row of test"
        tables.append(_mean_table(summary, title, summary.methods, passes, 2))
    return Section("Cost of a run", words.COST, tables=tables)


def _mean_table(
    summary: Summary, title: str, methods: Collection[str], value: Callable[[Record], float], digits: int
) -> Table:
    def row(method: str) -> Row:
        found = [summary.records(data_set, method) for data_set in summary.data_sets]
        cells = [number(statistics.mean(map(value, one)), digits) if one else NONE for one in found]
        return [summary.title(method), *cells]

    return Table([title, *summary.data_sets], list(in_groups(summary, methods, row)))


def _failures(failed: Mapping[str, Record]) -> Section:
    rows = [
        [f"{one.data_set} / {one.method} / {one.option} / seed {one.seed}", one.error]
        for one in failed.values()
    ]
    return Section("Failed runs", words.FAILED, tables=[Table(["run", "why"], rows)])
