"""What happened inside the generative stages, where the runs' own logs are still there."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.evidence import words
from benchmarks.evidence.cells import NONE
from benchmarks.evidence.summary import Summary
from benchmarks.evidence.tables import Section, Table
from hetegen_rec.evaluation.plots import RELATIVE, WEIGHT, fields_over_time
from hetegen_rec.evaluation.report_sections import PlotCard
from hetegen_rec.evaluation.run_record import StageRecord, read_run

_GENERATIVE = ("pretrain", "joint")


def diagnostic_sections(summary: Summary, out: Path) -> Iterator[Section]:
    """How hard fields were and what weight they got."""
    tables: list[Table] = []
    cards: list[PlotCard] = []
    for data_set in summary.data_sets:
        stages = {
            summary.title(method): stage
            for method in summary.methods
            if (stage := _generative_stage(summary, data_set, method, out)) is not None
        }
        if stages:
            tables.append(_fields_table(data_set, stages))
            cards += _field_plots(data_set, stages)
    if tables:
        yield Section(
            "What was reconstructed, and with what weight", words.FIELDS, tables=tables, plots=cards
        )


def _generative_stage(summary: Summary, data_set: str, method: str, out: Path) -> StageRecord | None:
    """That of the first seed, of a method that trains one."""
    records = summary.records(data_set, method)
    if not records or summary.grid.methods[method].of is not None:
        return None
    run = read_run(out / records[0].directory)
    found = [run.stages[name] for name in _GENERATIVE if name in run.stages]
    return found[0] if found and found[0].field_names else None


def _fields_table(data_set: str, stages: Mapping[str, StageRecord]) -> Table:
    names = next(iter(stages.values())).field_names
    rows = [[name, *(_field_cell(stage, name) for stage in stages.values())] for name in names]
    return Table([f"{data_set}: r (w)", *stages], rows)


def _field_cell(stage: StageRecord, name: str) -> str:
    relative, weight = (stage.field_series(name, measure) for measure in ("relative", "weight"))
    return f"{relative.last:.2f} ({weight.last:.2f})" if relative and weight else NONE


def _field_plots(data_set: str, stages: Mapping[str, StageRecord]) -> Iterator[PlotCard]:
    for title, stage in stages.items():
        for measure, what in ((RELATIVE, "relative loss"), (WEIGHT, "weight")):
            figure = fields_over_time(stage, measure)
            if figure is not None:
                yield PlotCard(f"{data_set}, {title}: {what}", figure, "")
