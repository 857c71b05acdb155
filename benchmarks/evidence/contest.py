"""The best of one side against the best of the other: what a person who looks at valid would get on test."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from benchmarks.evidence import words
from benchmarks.evidence.cells import gain_cell, interval_text, mark, p_cells, spread_text
from benchmarks.evidence.grid import Contest
from benchmarks.evidence.slices import TITLES
from benchmarks.evidence.summary import TEST_AUC, Comparison, Summary, corrected, slice_auc
from benchmarks.evidence.tables import Cell, Row, Section, Table
from hetegen_rec.evaluation.tables import number, percent


@dataclass(frozen=True)
class Match:
    """The best method of each side on one data set, both chosen by mean AUC on valid."""

    data_set: str
    ours: str
    baseline: str
    test: Comparison
    """Of AUC on test, corrected for the number of data sets."""
    slices: Mapping[str, Comparison]
    """The same on slices of test, by name, where they are defined; not corrected."""

    @property
    def gains_most_on(self) -> list[str]:
        """Slices on which the gain is larger than overall, if there is one overall."""
        return [name for name, one in self.slices.items() if one.mean > self.test.mean > 0.0]


def matches(summary: Summary, contest: Contest) -> list[Match]:
    """One a data set on which both sides have run with a common seed."""
    found = [match for name in summary.data_sets if (match := _match(summary, contest, name)) is not None]
    tests = corrected({match.data_set: match.test for match in found})
    return [replace(match, test=tests[match.data_set]) for match in found]


def _match(summary: Summary, contest: Contest, data_set: str) -> Match | None:
    ours, baseline = (
        summary.best_on_valid(data_set, summary.grid.members(groups))
        for groups in (contest.ours, contest.baselines)
    )
    if ours is None or baseline is None:
        return None
    test = summary.compare(data_set, ours, baseline, TEST_AUC)
    if test is None:
        return None
    slices = {name: summary.compare(data_set, ours, baseline, slice_auc(name)) for name in TITLES}
    defined = {name: one for name, one in slices.items() if one is not None}
    return Match(data_set, ours, baseline, test, defined)


def contest_sections(summary: Summary) -> Iterator[Section]:
    """One section, if the grid has a contest and both sides have run."""
    contest = summary.grid.contest
    found = matches(summary, contest) if contest is not None else []
    if contest is None or not found:
        return
    ours, baselines = (
        ", ".join(summary.grid.groups[name] for name in side) for side in (contest.ours, contest.baselines)
    )
    tables = [_outcome_table(summary, found), _gain_table(summary, found)]
    yield Section("The best against the best", words.contest(ours, baselines), verdict(found), tables=tables)


def verdict(found: list[Match]) -> str:
    """What the tables amount to, in one or two sentences."""
    higher = [match.data_set for match in found if match.test.mean > 0]
    sure = [match.data_set for match in found if match.test.mean > 0 and match.test.is_significant]
    lower = [match.data_set for match in found if match.test.mean < 0 and match.test.is_significant]
    sliced = [match.data_set for match in found if match.gains_most_on]
    return (
        f"Of {len(found)} data sets ours is higher on {_named(higher)}, with p < 0.05 on {_named(sure)}; it "
        f"is lower with p < 0.05 on {_named(lower)}. Where it is higher, it gains more on a slice of little "
        f"training data than overall on {_named(sliced)}."
    )


def _named(data_sets: list[str]) -> str:
    return f"{len(data_sets)} ({', '.join(data_sets)})" if data_sets else "none"


def _outcome_table(summary: Summary, found: list[Match]) -> Table:
    rows: list[Row] = []
    for match in found:
        spreads = [summary.spread(match.data_set, one, TEST_AUC) for one in (match.ours, match.baseline)]
        rows.append(
            [
                match.data_set,
                summary.title(match.ours),
                spread_text(spreads[0]),
                summary.title(match.baseline),
                spread_text(spreads[1]),
                gain_cell(match.test),
                *p_cells(match.test),
                str(len(match.test.differences)),
            ]
        )
    heading = ["AUC on test", "ours", "AUC", "baseline", "AUC", "difference", "p", "p, corrected", "seeds"]
    return Table(heading, rows)


def _gain_table(summary: Summary, found: list[Match]) -> Table:
    rows: list[Row] = [
        [
            match.data_set,
            number(match.test.mean, sign=True),
            percent(match.test.relative_improvement),
            *(_slice_cell(match, name) for name in TITLES),
            interval_text(summary.intervals(match.data_set, match.ours, match.baseline)),
        ]
        for match in found
    ]
    slices = [name.replace("_", " ") for name in TITLES]
    return Table(["gain of AUC", "overall", "RI", *slices, "bootstrap above / below"], rows)


def _slice_cell(match: Match, name: str) -> Cell:
    cell = gain_cell(match.slices.get(name))
    if name not in match.gains_most_on:
        return cell
    return replace(cell, is_best=True, note=mark(match.slices[name]))
