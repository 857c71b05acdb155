"""Results as tables for the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetegen_rec.evaluation.results import (
    STAGE_TITLES,
    Comparison,
    FieldReconstruction,
    StageEvaluation,
    compare_with_scratch,
    headline_split,
    read_evaluations,
    strategy_note,
)

NOT_DEFINED = "n/a"


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """A number with that many decimals, or "n/a"."""
    return NOT_DEFINED if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def percent(value: float | None) -> str:
    """A signed share in percent, or "n/a"."""
    return NOT_DEFINED if value is None else f"{100 * value:+.2f} %"


def interval_text(comparison: Comparison) -> str:
    """The confidence interval of the AUC difference, or "n/a"."""
    if comparison.interval is None:
        return NOT_DEFINED
    return f"{comparison.interval.low:+.4f} to {comparison.interval.high:+.4f}"


def results_tables(run_dir: str | Path) -> RenderableType:
    """Everything that the evaluated stages of a run say, for printing."""
    evaluations = read_evaluations(Path(run_dir))
    reconstructed = [
        reconstruction_table(stage, split, fields)
        for stage, evaluation in evaluations.items()
        for split, fields in evaluation.get("reconstruction", {}).items()
    ]
    if not any(evaluation["splits"] for evaluation in evaluations.values()):
        return Group(*reconstructed, Text("Nothing scores clicks yet: run finetune, joint or scratch."))
    split = headline_split(evaluations)
    comparisons = compare_with_scratch(Path(run_dir), evaluations, split)
    tables: list[RenderableType] = [*reconstructed, metrics_table(evaluations, split)]
    slices = slices_table(evaluations, split)
    if slices.row_count:
        tables.append(slices)
    if comparisons:
        tables.append(comparison_table(comparisons))
    return Group(*tables)


RECONSTRUCTION_COLUMNS = ("targets", "cross-entropy", "chance", "by frequency", "r", "top 1", "top 10")
RECONSTRUCTION_NOTE = (
    "Nats. r is cross-entropy over chance, by frequency: a guess that knows the field's frequencies alone. "
    "* Of in-batch candidates, not of the vocabulary."
)


def reconstruction_table(stage: str, split: str, fields: Mapping[str, FieldReconstruction]) -> Table:
    """One line a field: how well its noised cells were predicted."""
    title = f"Reconstruction of {split}, {stage}"
    table = Table(title=title, caption=RECONSTRUCTION_NOTE, title_justify="left", caption_justify="left")
    table.add_column("field")
    for heading in RECONSTRUCTION_COLUMNS:
        table.add_column(heading, justify="right")
    for name, one in fields.items():
        table.add_row(name + candidates_mark(one), *reconstruction_cells(one))
    return table


def candidates_mark(one: FieldReconstruction) -> str:
    """What follows the name of a field whose true value competes with in-batch candidates."""
    return " *" if one["among"] == "candidates" else ""


def reconstruction_cells(one: FieldReconstruction) -> list[str]:
    """A field's results in the order of RECONSTRUCTION_COLUMNS."""
    values = (
        one["cross_entropy"],
        one["chance"],
        one["baseline"],
        one["relative"],
        one["top_1"],
        one["top_10"],
    )
    return [f"{one['targets']:,}", *(number(value, 3) for value in values)]


def metrics_table(evaluations: Mapping[str, StageEvaluation], split: str) -> Table:
    """One line a stage: the metrics of one split."""
    table = Table(title=f"Metrics on {split}", title_justify="left")
    table.add_column("stage")
    for heading in ("rows", "AUC", "LogLoss", "NE", "GAUC", "calibration", "step"):
        table.add_column(heading, justify="right")
    for stage, evaluation in evaluations.items():
        result = evaluation["splits"].get(split)
        if result is None:
            continue
        names = ("auc", "log_loss", "normalized_entropy", "gauc", "calibration")
        values = [number(result.get(name)) for name in names]
        table.add_row(stage + strategy_note(result), f"{result['n']:,}", *values, f"{evaluation['step']:,}")
    return table


def slices_table(evaluations: Mapping[str, StageEvaluation], split: str) -> Table:
    """One line a slice: its size, and every stage's AUC and log loss."""
    results = {stage: one["splits"][split] for stage, one in evaluations.items() if split in one["splits"]}
    table = Table(title=f"Slices of {split}: AUC / LogLoss", title_justify="left")
    table.add_column("slice")
    table.add_column("rows", justify="right")
    table.add_column("clicks", justify="right")
    for stage in results:
        table.add_column(stage, justify="right")
    for name, first in slices_of(results).items():
        cells = []
        for result in results.values():
            found = result["slices"].get(name, {})
            cells.append(f"{number(found.get('auc'))} / {number(found.get('log_loss'))}")
        table.add_row(first["title"], f"{first['n']:,}", f"{first['positives']:,}", *cells)
    return table


def slices_of(results: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every slice that any stage has, with the first such stage's numbers; empty slices left out."""
    found: dict[str, dict[str, Any]] = {}
    for result in results.values():
        for name, part in result["slices"].items():
            if part["n"]:
                found.setdefault(name, part)
    return found


def comparison_table(comparisons: Mapping[str, Comparison]) -> Table:
    """One line a stage: how it stands against from-scratch."""
    first = next(iter(comparisons.values()))
    against = f"Against from-scratch{first.base_note} on {first.split}"
    table = Table(title=against, title_justify="left")
    table.add_column("stage")
    for heading in ("AUC difference", "95 % interval", "relative improvement"):
        table.add_column(heading, justify="right")
    for stage, comparison in comparisons.items():
        title = STAGE_TITLES[stage] + comparison.note
        difference = number(comparison.auc_difference, sign=True)
        improvement = percent(comparison.relative_improvement)
        table.add_row(title, difference, interval_text(comparison), improvement)
    return table
