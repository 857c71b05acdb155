"""What the finished runs amount to: values over seeds by data set and method, and how methods compare."""

import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from benchmarks.evidence.comparing import LEVEL, Spread, holm, paired_p_value, ranks, spread_of
from benchmarks.evidence.plan import Plan
from benchmarks.evidence.records import Record
from benchmarks.evidence.running import predictions_dir
from hetegen_rec.evaluation.metrics import relative_improvement
from hetegen_rec.evaluation.significance import Interval, auc_difference_interval, read_predictions

Metric = tuple[str, ...]
"""Path of a number in `Record.splits`."""
VALID_AUC: Metric = ("valid", "auc")
TEST_AUC: Metric = ("test", "auc")


def slice_auc(name: str) -> Metric:
    """AUC on test of one of `slices.TITLES`."""
    return ("test", "slices", name, "auc")


@dataclass(frozen=True)
class Comparison:
    """One method against another on one data set, paired over the seeds that both have."""

    differences: tuple[float, ...]
    """One a seed."""
    p_value: float | None
    """Of Student's paired t-test; None for fewer than two seeds."""
    adjusted: float | None
    """The same, corrected for the number of comparisons; None before."""
    relative_improvement: float | None
    """Of the means over these seeds."""

    @property
    def mean(self) -> float:
        """Above zero if the method is higher."""
        return statistics.mean(self.differences)

    @property
    def is_significant(self) -> bool:
        """Before correction."""
        return self.p_value is not None and self.p_value < LEVEL

    @property
    def stays_significant(self) -> bool:
        """After correction."""
        return self.adjusted is not None and self.adjusted < LEVEL


@dataclass(frozen=True)
class Ranking:
    """Ranks of methods among themselves; 1 is best."""

    by_data_set: dict[str, dict[str, float]]

    @property
    def means(self) -> dict[str, float]:
        """Over data sets, best first."""
        columns = list(self.by_data_set.values())
        names = columns[0] if columns else {}
        means = {name: statistics.mean(column[name] for column in columns) for name in names}
        return dict(sorted(means.items(), key=lambda item: item[1]))


class Summary:
    """The tables' numbers, from the records alone, but for the bootstrap, which reads predictions."""

    def __init__(self, plan: Plan, done: Mapping[str, Record], out: Path) -> None:
        self.plan, self.grid, self._done, self._out = plan, plan.grid, done, out

    @cached_property
    def data_sets(self) -> list[str]:
        """Those with a finished run."""
        return list(dict.fromkeys(data_set for data_set, _ in self._chosen))

    @cached_property
    def methods(self) -> list[str]:
        """Those with a finished run, group after group, in the order of the grid."""
        found = {method for _, method in self._chosen}
        in_order = self.grid.members(self.grid.groups) if self.grid.groups else self.grid.methods
        return [method for method in in_order if method in found]

    @cached_property
    def _chosen(self) -> dict[tuple[str, str], list[Record]]:
        """Finished runs with the chosen option, by data set and method, in order of seed."""
        chosen = {}
        for pair in self.plan.pairs:
            runs = self.plan.chosen_runs(*pair, self._done)
            records = [self._done[run.id] for run in runs if run.id in self._done]
            if records:
                chosen[pair] = records
        return chosen

    def title(self, method: str) -> str:
        """As the page names it."""
        return self.grid.methods[method].title

    def records(self, data_set: str, method: str) -> list[Record]:
        """Finished runs of a cell, in order of seed."""
        return self._chosen.get((data_set, method), [])

    @property
    def all_records(self) -> list[Record]:
        """Those of all cells."""
        return [record for records in self._chosen.values() for record in records]

    def sequences(self, data_set: str) -> list[Record]:
        """Finished runs that followed a data set, in order of seed."""
        runs = [run for run in self.plan.sequences if run.data_set == data_set]
        return [self._done[run.id] for run in runs if run.id in self._done]

    def search(self, data_set: str, method: str) -> dict[str, Record]:
        """What the search saw, by option."""
        runs = self.plan.search_runs(data_set, method)
        return {run.option: self._done[run.id] for run in runs if run.id in self._done}

    def values(self, data_set: str, method: str, metric: Metric) -> dict[int, float]:
        """By seed, where it is defined."""
        found = {record.seed: record.value(*metric) for record in self.records(data_set, method)}
        return {seed: value for seed, value in found.items() if value is not None}

    def spread(self, data_set: str, method: str, metric: Metric) -> Spread | None:
        """Mean and deviation over seeds."""
        return spread_of(list(self.values(data_set, method, metric).values()))

    def compare(self, data_set: str, method: str, base: str, metric: Metric) -> Comparison | None:
        """One method against another, not corrected; None without a common seed."""
        ours, theirs = (self.values(data_set, one, metric) for one in (method, base))
        return compare_paired(ours, theirs)

    def comparisons(self, data_set: str, metric: Metric) -> dict[str, Comparison]:
        """Every other method against the baseline, by method, corrected for their number."""
        base = self.grid.baseline
        others = [method for method in self.methods if method != base]
        return corrected({m: self.compare(data_set, m, base, metric) for m in others})

    def intervals(self, data_set: str, method: str, base: str) -> list[Interval]:
        """Of the AUC difference to another method on test, by resampling users or rows, one a seed."""
        theirs = {record.seed: record for record in self.records(data_set, base)}
        found = []
        for record in self.records(data_set, method):
            if record.seed in theirs:
                interval = _interval(self._out, record.run, theirs[record.seed].run)
                found += [interval] if interval is not None else []
        return found

    def means_on_valid(self, data_set: str, methods: Collection[str]) -> dict[str, float]:
        """Mean AUC of those methods that have run, over the seeds that all of these have."""
        values = {method: self.values(data_set, method, VALID_AUC) for method in methods}
        found = {method: by_seed for method, by_seed in values.items() if by_seed}
        seeds = set.intersection(*map(set, found.values())) if found else set()
        return {m: statistics.mean(by_seed[seed] for seed in seeds) for m, by_seed in found.items() if seeds}

    def best_on_valid(self, data_set: str, methods: Collection[str]) -> str | None:
        """The one of some methods that validation would choose; None if it cannot say yet."""
        means = self.means_on_valid(data_set, methods)
        return max(means, key=lambda method: means[method], default=None)

    def ranking(self, methods: Collection[str]) -> Ranking:
        """Ranks of some methods among themselves by mean AUC on valid.

        Only those take part that run wherever any of them does, and only data sets count where all of these
        have run.
        """
        where = [name for name in self.data_sets if set(methods) & set(self.grid.methods_of(name))]
        everywhere = [m for m in methods if all(self.grid.runs_on(m, data_set) for data_set in where)]
        means = {data_set: self.means_on_valid(data_set, everywhere) for data_set in where}
        complete = {data_set: one for data_set, one in means.items() if one and len(one) == len(everywhere)}
        return Ranking({data_set: ranks(one) for data_set, one in complete.items()})


def compare_paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Comparison | None:
    """Values by seed against others, not corrected; None without a common seed."""
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    if not pairs:
        return None
    differences = tuple(one - other for one, other in pairs)
    means = (statistics.mean(side) for side in zip(*pairs, strict=True))
    return Comparison(differences, paired_p_value(differences), None, relative_improvement(*means))


def corrected(comparisons: Mapping[str, Comparison | None]) -> dict[str, Comparison]:
    """Those that there are, with p-values corrected for their number (Holm)."""
    found = {name: one for name, one in comparisons.items() if one is not None}
    adjusted = holm({name: one.p_value for name, one in found.items() if one.p_value is not None})
    return {name: replace(one, adjusted=adjusted.get(name)) for name, one in found.items()}


def _interval(out: Path, ours: str, base: str) -> Interval | None:
    tables = [read_predictions(predictions_dir(out, run)) for run in (ours, base)]
    if tables[0] is None or tables[1] is None:
        return None
    return auc_difference_interval(tables[0], tables[1])
