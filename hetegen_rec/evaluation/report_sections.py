"""The parts of the report, from the headline down to the configuration."""

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml
from matplotlib.figure import Figure

from hetegen_rec.evaluation import plots
from hetegen_rec.evaluation import report_words as words
from hetegen_rec.evaluation.results import (
    BASE_STAGE,
    STAGE_TITLES,
    Comparison,
    FieldReconstruction,
    strategy_note,
)
from hetegen_rec.evaluation.run_record import RunRecord, StageRecord
from hetegen_rec.evaluation.tables import (
    RECONSTRUCTION_COLUMNS,
    RECONSTRUCTION_NOTE,
    candidates_mark,
    interval_text,
    number,
    percent,
    reconstruction_cells,
)


class PlotCard(NamedTuple):
    """A figure with its title and one sentence on what to see."""

    title: str
    figure: Figure
    caption: str


def drawn_cards(*candidates: tuple[str, Figure | None, str]) -> list[PlotCard]:
    """Those of which there was something to draw."""
    return [PlotCard(title, figure, caption) for title, figure, caption in candidates if figure is not None]


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    words: str = ""
    blocks: str = ""
    """Finished HTML: tiles and tables."""
    plots: Sequence[PlotCard] = field(default_factory=list)


class Metric(NamedTuple):
    """A column of the metrics table."""

    key: str
    title: str
    loss: Callable[[float], float]
    """Smaller is better."""
    note: str


_METRICS = (
    Metric("auc", "AUC", lambda value: -value, "higher is better"),
    Metric("log_loss", "LogLoss", lambda value: value, "lower is better"),
    Metric("normalized_entropy", "NE", lambda value: value, "below 1 beats a constant"),
    Metric("gauc", "GAUC", lambda value: -value, "AUC within a user"),
    Metric("calibration", "Calibration", lambda value: abs(value - 1.0), "1 is right"),
    Metric("log_loss_scaled", "LogLoss, T of valid", lambda value: value, "temperature from valid"),
)


def sections_of(record: RunRecord, split: str, comparisons: Mapping[str, Comparison]) -> Iterator[Section]:
    """The sections that the run has something for, in order."""
    results = {
        name: result for name, stage in record.stages.items() if (result := stage.result(split)) is not None
    }
    if results:
        yield _headline(record, split, results, comparisons)
        yield from _curves(split, results)
    for stage in record.stages.values():
        yield from _fields(stage)
    yield from _training(record)
    yield from _data(record)


def _headline(
    record: RunRecord,
    split: str,
    results: Mapping[str, dict[str, Any]],
    comparisons: Mapping[str, Comparison],
) -> Section:
    stage = words.best_stage(record, split)
    tiles = _tiles(stage, results) if stage else ""
    tables = [_metrics_table(split, results)]
    if comparisons:
        tables.append(_comparison_table(comparisons))
    valid = {name: found for name, one in record.stages.items() if (found := one.result("valid")) is not None}
    if split != "valid" and valid:
        tables.append(_metrics_table("valid", valid))
    note = (
        f'<p class="small">{words.ONE_SEED}</p>'
        if any(comparison.interval for comparison in comparisons.values())
        else ""
    )
    return Section("", blocks=tiles + "".join(tables) + note)


def _tiles(stage: str, results: Mapping[str, dict[str, Any]]) -> str:
    result = results[stage]
    base = results.get(BASE_STAGE, {}) if stage != BASE_STAGE else {}
    tiles = []
    for metric in _METRICS[:5]:
        value = result.get(metric.key)
        if value is None:
            continue
        reference = base.get(metric.key)
        note = metric.note if reference is None else f"from scratch: {reference:.4f}"
        tiles.append(
            f'<div class="tile"><span class="name">{metric.title}</span>'
            f'<span class="value">{value:.4f}</span><span class="note">{note}</span></div>'
        )
    return '<div class="tiles">' + "".join(tiles) + "</div>"


def _metrics_table(split: str, results: Mapping[str, dict[str, Any]]) -> str:
    metrics = [m for m in _METRICS if any(one.get(m.key) is not None for one in results.values())]
    heading = ["Metrics on " + split, "rows", *(metric.title for metric in metrics)]
    rows = []
    for stage, result in results.items():
        cells = [_stage_cell(stage, strategy_note(result)), f"<td>{result['n']:,}</td>"]
        cells += [_metric_cell(metric, stage, results) for metric in metrics]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _table(heading, rows)


def _stage_cell(stage: str, note: str = "") -> str:
    return f'<td class="{stage}"><span class="dot"></span>{STAGE_TITLES[stage]}{note}</td>'


def _metric_cell(metric: Metric, stage: str, results: Mapping[str, dict[str, Any]]) -> str:
    losses = {
        name: metric.loss(result[metric.key])
        for name, result in results.items()
        if result.get(metric.key) is not None
    }
    is_best = len(losses) > 1 and losses.get(stage) == min(losses.values())
    text = number(results[stage].get(metric.key))
    if metric.key == "gauc" and results[stage].get("gauc_users"):
        text += f' <span class="note">({results[stage]["gauc_users"]:,} users)</span>'
    return f'<td class="best">{text}</td>' if is_best else f"<td>{text}</td>"


def _comparison_table(comparisons: Mapping[str, Comparison]) -> str:
    rows = []
    for stage, one in comparisons.items():
        difference = number(one.auc_difference, sign=True)
        cells = (difference, interval_text(one), percent(one.relative_improvement))
        rows.append(f"<tr>{_stage_cell(stage, one.note)}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    first = next(iter(comparisons.values()))
    against = f"Against from scratch{first.base_note} on {first.split}"
    heading = [against, "AUC difference", "95 % interval", "relative improvement"]
    return _table(heading, rows)


def _table(heading: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    cells = "".join(f"<th>{title}</th>" for title in heading)
    return f'<div class="card"><table class="{kind}"><tr>{cells}</tr>{"".join(rows)}</table></div>'


def _curves(split: str, results: Mapping[str, dict[str, Any]]) -> Iterator[Section]:
    cards = drawn_cards(
        ("Slices", plots.slice_bars(results), words.slices_caption(split)),
        (
            "ROC curve",
            plots.roc_curves(results),
            words.ROC,
        ),
        (
            "Calibration",
            plots.calibration_curves(results),
            words.CALIBRATION,
        ),
    )
    if cards:
        yield Section(f"Results on {split}", plots=cards)


def _fields(stage: StageRecord) -> Iterator[Section]:
    if not stage.field_names:
        return
    cards = drawn_cards(
        (
            "Difficulty of every field",
            plots.fields_over_time(stage, plots.DIFFICULTY),
            words.difficulty_caption(stage),
        ),
        ("Weight of every field", plots.fields_over_time(stage, plots.WEIGHT), words.weight_caption(stage)),
        (
            "Reconstruction loss over time",
            plots.fields_over_time(stage, plots.RELATIVE),
            words.RELATIVE_LOSS,
        ),
        ("Reconstruction loss at the end", plots.final_field_losses(stage), words.final_loss_caption(stage)),
        ("Share of the gradient", plots.gradient_shares(stage), words.gradient_caption(stage)),
    )
    title = "What was hard to reconstruct" + (", in the joint stage" if stage.name == "joint" else "")
    yield Section(
        title,
        words.fields(stage),
        "".join(_reconstruction_table(split, fields) for split, fields in stage.reconstruction.items()),
        cards,
    )


def _reconstruction_table(split: str, fields: Mapping[str, FieldReconstruction]) -> str:
    levels = next((one["levels"] for one in fields.values() if one["levels"]), [])
    heading = [f"Reconstruction of {split}", *RECONSTRUCTION_COLUMNS]
    heading += [f"t {level['from']:.2f}-{level['to']:.2f}" for level in levels]
    rows = []
    for name, one in sorted(fields.items(), key=lambda item: -(item[1]["relative"] or 0.0)):
        cells = [name + candidates_mark(one), *reconstruction_cells(one)]
        cells += [number(level["cross_entropy"], 3) for level in one["levels"]]
        rows.append(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    note = RECONSTRUCTION_NOTE + words.BY_NOISE_LEVEL * bool(levels)
    return f'{_table(heading, rows)}<p class="small">{html.escape(note)}</p>'


def _training(record: RunRecord) -> Iterator[Section]:
    cards = drawn_cards(
        (
            "AUC on valid",
            plots.valid_auc(record.stages),
            words.VALID_AUC,
        ),
        (
            "Loss of the click",
            plots.click_losses(record.stages),
            words.CLICK_LOSS,
        ),
        (
            "Generative loss",
            plots.generative_losses(record.stages),
            words.GENERATIVE_LOSS,
        ),
    )
    rows = [row for stage in record.stages.values() for row in _training_row(stage)]
    heading = ["Stage", "steps", "epochs", "rows seen", "minutes", "rows / s"]
    if rows or cards:
        yield Section("Training", blocks=_table(heading, rows) if rows else "", plots=cards)


def _training_row(stage: StageRecord) -> Iterator[str]:
    if not stage.train:
        return
    last = stage.train[-1]
    cells = [
        f"{last.get('step', 0):,}",
        number(last.get("epoch"), 2),
        f"{last.get('rows', 0):,}",
        number(last["seconds"] / 60 if "seconds" in last else None, 1),
        "n/a" if stage.samples_per_second is None else f"{stage.samples_per_second:,.0f}",
    ]
    yield f"<tr>{_stage_cell(stage.name)}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _data(record: RunRecord) -> Iterator[Section]:
    config = record.config
    if not config:
        return
    tables = _split_table(record) + _field_table(config.get("features") or {})
    text = html.escape(yaml.safe_dump(config, sort_keys=False))
    details = f"<details><summary>Resolved configuration</summary><pre>{text}</pre></details>"
    yield Section("Data and configuration", _model_words(config), tables + details)


def _split_table(record: RunRecord) -> str:
    found: dict[str, dict[str, Any]] = {}
    for evaluation in record.evaluations.values():
        found.update(evaluation["splits"])
    rows = [
        f"<tr><td>{html.escape(split)}</td><td>{one['n']:,}</td><td>{one['positives']:,}</td>"
        f"<td>{100 * one['positives'] / one['n']:.2f} %</td></tr>"
        for split, one in found.items()
    ]
    return _table(["Split", "rows", "clicks", "click rate"], rows) if rows else ""


def _field_table(schema: Mapping[str, Any]) -> str:
    rows = []
    for one in schema.get("fields") or []:
        cells = (one.get("name"), one.get("kind"), _vocabulary_words(one), _role_words(one, schema))
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    return _table(["Field", "kind", "values become ids by", "role"], rows, "words") if rows else ""


def _vocabulary_words(one: Mapping[str, Any]) -> str:
    if one.get("table"):
        return f"the table of {one['table']}, {one.get('max_length')} positions"
    texts = {
        "vocab": f"a vocabulary, minimum count {one.get('min_count')}",
        "hash": f"a hash into {one.get('hash_size')} rows",
        "buckets": f"{one.get('num_buckets')} quantile buckets",
    }
    return texts.get(str(one.get("vocabulary")), str(one.get("vocabulary")))


def _role_words(one: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    roles = [role for role in ("user", "item") if schema.get(role) == one.get("name")]
    if one.get("reconstruct") is False:
        roles.append("not reconstructed")
    return ", ".join(roles)


def _model_words(config: Mapping[str, Any]) -> str:
    model, train = config.get("model") or {}, config.get("train") or {}
    denoiser, balance = model.get("denoiser") or {}, model.get("balance") or {}
    backbone = (model.get("backbone") or {}).get("name", "hetegen")
    own = {
        "layers": denoiser.get("num_layers"),
        "attention guided by difficulty": (denoiser.get("attention") or {}).get("guidance"),
        "balancing": balance.get("form"),
        "click head": (model.get("ctr") or {}).get("head"),
    }
    parts = {
        "width": model.get("dim"),
        **(own if backbone == "hetegen" else {"backbone": backbone}),
        "batch": train.get("batch_size"),
        "table optimizer": train.get("table_optimizer"),
        "seed": config.get("seed"),
    }
    known = [f"{name} {value}" for name, value in parts.items() if value is not None]
    return "The network: " + ", ".join(known) + "." if known else ""
