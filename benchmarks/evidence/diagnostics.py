"""What happened inside the generative stages, where the runs' own logs are still there."""

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.evidence import words
from benchmarks.evidence.cells import NONE
from benchmarks.evidence.comparing import ranks
from benchmarks.evidence.summary import Summary
from benchmarks.evidence.tables import Row, Section, Table
from hetegen_rec.config.run import GENERATIVE_STAGES
from hetegen_rec.evaluation.plots import DIFFICULTY, RELATIVE, WEIGHT, fields_over_time
from hetegen_rec.evaluation.report_sections import PlotCard
from hetegen_rec.evaluation.results import FieldReconstruction, read_evaluation
from hetegen_rec.evaluation.run_record import Series, StageRecord, read_run
from hetegen_rec.evaluation.tables import number

_Fields = Mapping[str, FieldReconstruction]


@dataclass(frozen=True)
class Generative:
    """The generative stage of one method on one data set."""

    title: str
    directories: Sequence[Path]
    """Of the stage, one a seed."""
    is_ours: bool
    """Whether the method is on our side of the contest; true without one."""

    @cached_property
    def first(self) -> StageRecord:
        """What was kept of it with the first seed, which is all that most tables need."""
        return _record_of(self.directories[0])

    @cached_property
    def stages(self) -> list[StageRecord]:
        """The same, one a seed."""
        return [self.first, *map(_record_of, self.directories[1:])]

    @cached_property
    def reconstructions(self) -> list[_Fields]:
        """Held-out reconstruction by field, one a seed that has it."""
        found = [read_evaluation(directory) for directory in self.directories]
        valid = [one.get("reconstruction", {}).get("valid") for one in found if one is not None]
        return [fields for fields in valid if fields]

    @property
    def is_uniform(self) -> bool:
        """Whether this is diffusion with the same weight for every field."""
        model = self.first.config.get("model", {})
        objective, balance = model.get("objective", {}), model.get("balance", {})
        return objective.get("name") == "diffusion" and balance.get("form") == "uniform"

    def mean(self, field: str, measure: str) -> float | None:
        """A measure of a field's log, on average over training and seeds; None if it is not there."""
        found = self._series(field, measure)
        return statistics.mean(float(one.y.mean()) for one in found) if found else None

    def num_lines(self, measure: str) -> int:
        """Lines of the logs of all seeds that have a measure of the fields."""
        return max(sum(len(one.y) for one in self._series(name, measure)) for name in self.first.field_names)

    def _series(self, field: str, measure: str) -> list[Series]:
        found = [stage.field_series(field, measure) for stage in self.stages]
        return [one for one in found if one]


def _record_of(directory: Path) -> StageRecord:
    return read_run(directory.parent).stages.get(directory.name, StageRecord(directory.name))


def diagnostic_sections(summary: Summary, out: Path) -> Iterator[Section]:
    """Gradient shares, trajectories and held-out reconstruction, as far as they were measured."""
    found = {data_set: list(_generative(summary, data_set, out)) for data_set in summary.data_sets}
    yield from _premise(found)
    yield from _held_out(found)
    yield from _trajectories(found)


def _generative(summary: Summary, data_set: str, out: Path) -> Iterator[Generative]:
    contest = summary.grid.contest
    for method in summary.methods:
        one = summary.grid.methods[method]
        stage = next((stage for stage in one.stages if stage in GENERATIVE_STAGES), None)
        records = summary.records(data_set, method)
        if stage is None or not records:
            continue
        directories = [out / record.directory / stage for record in records]
        found = Generative(one.title, directories, contest is None or one.group in contest.ours)
        if found.first.field_names:
            yield found


def _premise(found: Mapping[str, Sequence[Generative]]) -> Iterator[Section]:
    """Whether easy fields take most of the gradient, where all have the same weight."""
    overall: list[Row] = []
    tables = []
    for data_set, methods in found.items():
        uniform = next((one for one in methods if one.is_uniform and _shares(one)), None)
        if uniform is not None:
            overall.append([data_set, *_dominance(uniform), str(uniform.num_lines("gradient_share"))])
            tables.append(_share_table(data_set, uniform))
    if overall:
        of_shares = ["fields", "largest share", "easier half: share", "if even", "rank correlation"]
        table = Table(["data set", *of_shares, "probed log lines"], overall)
        yield Section("Do easy fields dominate the gradient?", words.PREMISE, tables=[table, *tables])


def _shares(method: Generative) -> dict[str, float]:
    """Share of the gradient norm by field, largest first; empty if it was not probed."""
    means = {name: method.mean(name, "gradient_share") for name in method.first.field_names}
    found = {name: share for name, share in means.items() if share is not None}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _dominance(method: Generative) -> Row:
    shares = _shares(method)
    relative = {name: method.mean(name, "relative") or 0.0 for name in shares}
    easier = sorted(shares, key=lambda name: relative[name])[: len(shares) // 2]
    largest = next(iter(shares))
    return [
        str(len(shares)),
        f"{largest}: {100 * shares[largest]:.0f} %",
        f"{100 * sum(shares[name] for name in easier):.0f} %",
        f"{100 * len(easier) / len(shares):.0f} %",
        number(_rank_correlation(relative, shares), 2, sign=True),
    ]


def _rank_correlation(first: Mapping[str, float], second: Mapping[str, float]) -> float | None:
    """Spearman's; None if one of the two is the same for all."""
    columns = [list(ranks({name: one[name] for name in first}).values()) for one in (first, second)]
    if any(len(set(column)) < 2 for column in columns):
        return None
    return float(np.corrcoef(columns)[0, 1])


def _share_table(data_set: str, method: Generative) -> Table:
    shares = _shares(method)
    rows: list[Row] = [
        [
            name,
            f"{100 * share:.1f} %",
            f"{share * len(shares):.2f}",
            number(method.mean(name, "relative"), 2),
            number(method.mean(name, "label_cosine"), 2, sign=True),
        ]
        for name, share in shares.items()
    ]
    return Table([data_set, "share", "times the even share", "r", "cosine with the label's gradient"], rows)


def _held_out(found: Mapping[str, Sequence[Generative]]) -> Iterator[Section]:
    """How well held-out rows were reconstructed, by method and by field."""
    tables = []
    for data_set, methods in found.items():
        measured = [one for one in methods if one.reconstructions]
        if measured:
            rows = [[one.title, *_over_fields(one.reconstructions)] for one in measured]
            heading = [data_set, "r", "over a guess by frequency", "top 1", "top 10", "seeds"]
            tables.append(Table(heading, rows))
            tables.append(_accuracy_table(data_set, [one for one in measured if one.is_ours]))
    if tables:
        yield Section("Reconstruction of held-out rows", words.HELD_OUT, tables=tables)


def _over_fields(seeds: Sequence[_Fields]) -> list[str]:
    """Means over fields, and then over seeds."""
    fields = [one for seed in seeds for one in seed.values()]
    columns = (
        [one["relative"] for one in fields],
        [_of_baseline(one) for one in fields],
        [one["top_1"] for one in fields],
        [one["top_10"] for one in fields],
    )
    return [*(number(_mean(column), 3) for column in columns), str(len(seeds))]


def _of_baseline(one: FieldReconstruction) -> float | None:
    """Cross-entropy as a share of that of a guess by the field's frequencies."""
    loss, guess = one["cross_entropy"], one["baseline"]
    return None if loss is None or not guess else loss / guess


def _mean(values: Collection[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return statistics.mean(defined) if defined else None


def _accuracy_table(data_set: str, methods: Sequence[Generative]) -> Table:
    names = list(dict.fromkeys(name for one in methods for name in one.first.field_names))
    rows = [[name, *(_accuracy(one.reconstructions, name) for one in methods)] for name in names]
    return Table([f"{data_set}: top 1 / top 10", *(one.title for one in methods)], rows)


def _accuracy(seeds: Sequence[_Fields], name: str) -> str:
    fields = [seed[name] for seed in seeds if name in seed]
    first, tenth = (_mean([one[key] for one in fields]) for key in ("top_1", "top_10"))
    return NONE if first is None or tenth is None else f"{first:.2f} / {tenth:.2f}"


def _trajectories(found: Mapping[str, Sequence[Generative]]) -> Iterator[Section]:
    """How hard fields were and what weight they got."""
    tables = [_fields_table(data_set, methods) for data_set, methods in found.items() if methods]
    cards = [
        card
        for data_set, methods in found.items()
        for one in methods
        if one.is_ours
        for card in _plots(f"{data_set}, {one.title}", one.first)
    ]
    if tables:
        yield Section("Difficulty and weight of the fields", words.FIELDS, tables=tables, plots=cards)


def _fields_table(data_set: str, methods: Sequence[Generative]) -> Table:
    names = methods[0].first.field_names
    rows = [[name, *(_end(one.first, name) for one in methods)] for name in names]
    return Table([f"{data_set}: r (w)", *(one.title for one in methods)], rows)


def _end(stage: StageRecord, name: str) -> str:
    relative, weight = (stage.field_series(name, measure) for measure in ("relative", "weight"))
    return f"{relative.last:.2f} ({weight.last:.2f})" if relative and weight else NONE


def _plots(title: str, stage: StageRecord) -> Iterator[PlotCard]:
    """Over the steps; of difficulty and weight only where they move."""
    for measure, what in ((RELATIVE, "relative loss r"), (DIFFICULTY, "difficulty s"), (WEIGHT, "weight w")):
        series = [stage.field_series(name, measure.key) for name in stage.field_names]
        figure = fields_over_time(stage, measure) if any(map(_moves, series)) else None
        if figure is not None:
            yield PlotCard(f"{title}: {what}", figure, "")


def _moves(series: Series) -> bool:
    return len(set(series.y.tolist())) > 1
