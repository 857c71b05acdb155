"""What the finished runs amount to: values over seeds by data set and method, and how methods compare."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
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
    """One method against the baseline on one data set, paired over the seeds that both have."""

    differences: tuple[float, ...]
    """One a seed."""
    p_value: float | None
    """Of Student's paired t-test; None for fewer than two seeds."""
    adjusted: float | None
    """The same, corrected for the number of methods on the data set."""
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
        """Those with a finished run, in the order of the grid."""
        found = {method for _, method in self._chosen}
        return [method for method in self.grid.methods if method in found]

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

    def records(self, data_set: str, method: str) -> list[Record]:
        """Finished runs of a cell, in order of seed."""
        return self._chosen.get((data_set, method), [])

    @property
    def all_records(self) -> list[Record]:
        """Those of all cells."""
        return [record for records in self._chosen.values() for record in records]

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

    def comparisons(self, data_set: str, metric: Metric) -> dict[str, Comparison]:
        """Every other method against the baseline, by method; those without a common seed are left out."""
        base = self.values(data_set, self.grid.baseline, metric)
        pairs = {}
        for method in self.methods:
            ours = self.values(data_set, method, metric)
            common = sorted(ours.keys() & base.keys())
            if method != self.grid.baseline and common:
                pairs[method] = [(ours[seed], base[seed]) for seed in common]
        differences = {method: tuple(a - b for a, b in values) for method, values in pairs.items()}
        p_values = {method: paired_p_value(values) for method, values in differences.items()}
        adjusted = holm({method: p for method, p in p_values.items() if p is not None})
        return {
            method: Comparison(
                differences[method],
                p_values[method],
                adjusted.get(method),
                relative_improvement(*(statistics.mean(side) for side in zip(*pairs[method], strict=True))),
            )
            for method in pairs
        }

    def intervals(self, data_set: str, method: str) -> list[Interval]:
        """Of the AUC difference to the baseline on test, by resampling users or rows, one a seed."""
        base = {record.seed: record for record in self.records(data_set, self.grid.baseline)}
        found = []
        for record in self.records(data_set, method):
            if record.seed in base:
                interval = _interval(self._out, record.run, base[record.seed].run)
                found += [interval] if interval is not None else []
        return found

    @cached_property
    def ranks(self) -> dict[str, dict[str, float]]:
        """Ranks by mean AUC on valid, of the methods that run everywhere, by data set where all have."""
        everywhere = [m for m in self.methods if self.grid.methods[m].only is None]
        found = {}
        for data_set in self.data_sets:
            spreads = {method: self.spread(data_set, method, VALID_AUC) for method in everywhere}
            means = {method: spread.mean for method, spread in spreads.items() if spread is not None}
            if len(means) == len(everywhere):
                found[data_set] = ranks(means)
        return found

    @property
    def mean_ranks(self) -> dict[str, float]:
        """Over data sets, best first."""
        columns = list(self.ranks.values())
        names = columns[0] if columns else {}
        means = {name: statistics.mean(column[name] for column in columns) for name in names}
        return dict(sorted(means.items(), key=lambda item: item[1]))

    def best_on_valid(self, data_set: str) -> str:
        """The method that validation would choose."""
        spreads = {method: self.spread(data_set, method, VALID_AUC) for method in self.methods}
        means = {method: spread.mean for method, spread in spreads.items() if spread is not None}
        return max(means, key=lambda method: means[method])


def _interval(out: Path, ours: str, base: str) -> Interval | None:
    tables = [read_predictions(predictions_dir(out, run)) for run in (ours, base)]
    if tables[0] is None or tables[1] is None:
        return None
    return auc_difference_interval(tables[0], tables[1])
