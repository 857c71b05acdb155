"""Plots of the report. Each function draws one figure, or returns None where there is nothing to show."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hetegen_rec.evaluation.results import STAGE_TITLES
from hetegen_rec.evaluation.run_record import Series, StageRecord
from hetegen_rec.evaluation.tables import slices_of

STAGE_COLORS = {"pretrain": "#c9822b", "finetune": "#2459a9", "joint": "#1f8a70", "scratch": "#8b909a"}

INK, MUTED, _GRID, _REST = "#22262e", "#6b7280", "#e6e8ec", "#d3d7de"
_FIELD_COLORS = (
    "#b3423a",
    "#c9822b",
    "#8a7a1f",
    "#4f8a3c",
    "#1f8a70",
    "#2b86a8",
    "#2459a9",
    "#5c4fb0",
    "#9a4a9c",
    "#6d5a4e",
)
_SIZE = (5.6, 3.6)  # inches: two side by side at 1200 px, one on a phone with its text still legible
_LONGEST_NAME = 18  # characters of a field beside its line or bar
STYLE = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#b5bac4",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "svg.hashsalt": "hetegen_rec",
}


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG whose text is drawn as paths: the same on every machine."""
    with mpl.rc_context(STYLE):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


@contextmanager
def _canvas(height: float = _SIZE[1]) -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
        yield figure, figure.add_subplot()


class FieldMeasure(NamedTuple):
    """How one measure of the fields is drawn over time."""

    key: str
    label: str
    reference: float
    """Where the dashed line stands."""


DIFFICULTY = FieldMeasure("difficulty", "learnt difficulty $s_f$ (dashed: start)", 0.0)
WEIGHT = FieldMeasure("weight", "weight $w_f$ in the loss (dashed: uniform)", 1.0)
RELATIVE = FieldMeasure("relative", "relative loss $r_f$ (dashed: chance)", 1.0)


def fields_over_time(stage: StageRecord, measure: FieldMeasure) -> Figure | None:
    """One line a field, labelled at its end; of many fields only the extremes stand out."""
    series = {name: stage.field_series(name, measure.key).thinned() for name in stage.field_names}
    series = {name: one for name, one in series.items() if one}
    if not series:
        return None
    colors = _field_colors(stage.field_names)
    with _canvas() as (figure, axes):
        axes.axhline(measure.reference, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for name, one in series.items():
            stands_out = name in colors
            axes.plot(
                one.x,
                one.y,
                color=colors.get(name, _REST),
                linewidth=1.7 if stands_out else 1.0,
                zorder=3 if stands_out else 2,
            )
        axes.set_xlabel("step")
        axes.set_ylabel(measure.label)
        axes.margins(x=0.01)
        _label_ends(axes, {n: (one.last, colors[n]) for n, one in series.items() if n in colors})
    return figure


def _field_colors(names: Sequence[str]) -> dict[str, str]:
    """Colours of the fields that stand out, hardest first; the same in every plot of a stage."""
    shown = names if len(names) <= len(_FIELD_COLORS) else [*names[:6], *names[-4:]]
    return dict(zip(shown, _FIELD_COLORS, strict=False))


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, str]]) -> None:
    """Names beside the ends of their lines, moved apart where they would overlap."""
    ordered = sorted(ends, key=lambda name: ends[name][0])
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    wanted = [(ends[name][0] - low) / (high - low) for name in ordered]
    for name, y, place in zip(ordered, wanted, _spread(wanted, gap=0.062), strict=True):
        value, color = ends[name]
        axes.plot(
            [1.0, 1.03], [y, place], color=color, linewidth=0.8, transform=axes.transAxes, clip_on=False
        )
        text = f"{_short(name)}  {round(value, 2) + 0.0:.2f}"  # + 0.0: no minus zero
        axes.text(1.04, place, text, color=color, fontsize=8.5, va="center", transform=axes.transAxes)


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves ascending places apart by at least `gap`, keeping them within 0 and 1 if they fit."""
    spread = list(places)
    for i in range(1, len(spread)):
        spread[i] = max(spread[i], spread[i - 1] + gap)
    for i in range(len(spread) - 1, -1, -1):
        bound = 1.0 if i == len(spread) - 1 else spread[i + 1] - gap
        spread[i] = min(spread[i], bound)
    return spread


def _short(name: str) -> str:
    """Cuts the middle out of a long name: siblings differ at their ends."""
    if len(name) <= _LONGEST_NAME:
        return name
    tail = _LONGEST_NAME // 2
    return f"{name[: _LONGEST_NAME - tail - 1]}…{name[-tail:]}"


def final_field_losses(stage: StageRecord) -> Figure | None:
    """Bars of the final relative loss, worst on top, with the loss in nats."""
    series = {name: stage.field_series(name, "relative") for name in stage.field_names}
    final = {name: one.last for name, one in series.items() if one}
    if not final:
        return None
    losses = {name: stage.field_series(name, "loss") for name in final}
    texts = {
        name: f"{losses[name].last:.2f} nats" if losses[name] else f"{value:.2f}"
        for name, value in final.items()
    }
    return _field_bars(stage, final, texts, "relative loss $r_f$ at the end (1 = chance)", reference=1.0)


def gradient_shares(stage: StageRecord) -> Figure | None:
    """Bars of each field's share of the gradient norm, mean over training, largest on top."""
    shares = stage.mean_gradient_shares
    if not shares:
        return None
    texts = {name: f"{100 * share:.1f} %" for name, share in shares.items()}
    label = "share of the gradient norm, mean over training (dashed: even)"
    return _field_bars(stage, shares, texts, label, reference=1.0 / len(shares))


def _field_bars(
    stage: StageRecord, values: Mapping[str, float], texts: Mapping[str, str], label: str, reference: float
) -> Figure:
    """A bar a field with a text behind it, the largest on top; a dashed line at the reference."""
    ordered = sorted(values, key=lambda name: values[name])
    colors = _field_colors(stage.field_names)
    with _canvas(height=max(_SIZE[1], 0.24 * len(ordered) + 0.9)) as (figure, axes):
        bars = [colors.get(name, "#aab0bb") for name in ordered]
        axes.barh(range(len(ordered)), [values[name] for name in ordered], color=bars, height=0.68)
        axes.set_yticks(range(len(ordered)), [_short(name) for name in ordered])
        for place, name in enumerate(ordered):
            _label_bar(axes, values[name], place, texts[name])
        axes.axvline(reference, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1.18 * max(reference, *values.values()))
        axes.set_ylim(-0.6, len(ordered) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xlabel(label)
    return figure


def _label_bar(axes: Axes, x: float, y: float, text: str) -> None:
    """A number behind the end of a bar, legible on top of lines."""
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8, bbox=paper)


def generative_losses(stages: Mapping[str, StageRecord]) -> Figure | None:
    """The balanced reconstruction loss of the generative stages over epochs."""
    lines = {name: stage.term_series("generative").thinned() for name, stage in stages.items()}
    lines = {name: one for name, one in lines.items() if one}
    if not lines:
        return None
    with _canvas() as (figure, axes):
        for name, one in lines.items():
            axes.plot(one.x, one.y, color=STAGE_COLORS[name], label=f"{STAGE_TITLES[name]}  {one.last:.3f}")
        axes.set_xlabel("epoch")
        axes.set_ylabel("generative loss")
        axes.legend()
    return figure


def click_losses(stages: Mapping[str, StageRecord]) -> Figure | None:
    """Training loss of the click as lines, log loss on valid as marks, over epochs."""
    trained = {
        name: stage.term_series("click") or stage.term_series("label") for name, stage in stages.items()
    }
    validated = {name: stage.evaluation_series("log_loss") for name, stage in stages.items()}
    if not any(trained.values()) and not any(validated.values()):
        return None
    with _canvas() as (figure, axes):
        for name in _by_final_value(stages, validated, trained):
            color, one, valid = STAGE_COLORS[name], trained[name].thinned(120), validated[name]
            if one:
                axes.plot(one.x, one.y, color=color, linewidth=1, alpha=0.5)
            if valid:
                axes.plot(valid.x, valid.y, color=color, marker="o", markersize=4.5)
            if one or valid:
                last = f"last valid {valid.last:.4f}" if valid else f"last train {one.last:.4f}"
                axes.plot([], [], color=color, linewidth=3, label=f"{STAGE_TITLES[name]}, {last}")
        axes.set_xlabel("epoch")
        axes.set_ylabel("cross-entropy of the click (nats)")
        # Overfitting fills the upper right, so the legend gets a strip of its own above the lines.
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.3 * (high - low))
        axes.legend(loc="upper right")
    return figure


def valid_auc(stages: Mapping[str, StageRecord]) -> Figure | None:
    """AUC on valid over epochs, with the best evaluation of each stage marked."""
    lines = {name: stage.evaluation_series("auc") for name, stage in stages.items()}
    lines = {name: one for name, one in lines.items() if one}
    if not lines:
        return None
    with _canvas() as (figure, axes):
        for name in sorted(lines, key=lambda name: -float(lines[name].y.max())):
            one, color = lines[name], STAGE_COLORS[name]
            best = int(one.y.argmax())
            label = f"{STAGE_TITLES[name]}, best {one.y[best]:.4f}"
            axes.plot(one.x, one.y, color=color, marker="o", markersize=4, label=label)
            axes.plot(one.x[best], one.y[best], "o", markersize=9, markerfacecolor="none", color=color)
        axes.set_xlabel("epoch")
        axes.set_ylabel("AUC on valid")
        axes.margins(x=0.06, y=0.12)
        axes.legend()
    return figure


def over_periods(lines: Mapping[str, Mapping[int, float]], label: str) -> Figure | None:
    """One line a way of following a log: a metric by the number of the tested period."""
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return None
    with _canvas() as (figure, axes):
        for color, (name, line) in zip(STAGE_COLORS.values(), lines.items(), strict=False):
            axes.plot(list(line), list(line.values()), color=color, marker="o", markersize=4, label=name)
        axes.set_xlabel("tested period")
        axes.set_ylabel(label)
        axes.set_xticks(sorted({period for line in lines.values() for period in line}))
        axes.margins(x=0.06, y=0.12)
        axes.legend()
    return figure


def _by_final_value(names: Mapping[str, StageRecord], *sources: Mapping[str, Series]) -> list[str]:
    def final(name: str) -> float:
        return next((source[name].last for source in sources if source[name]), np.inf)

    return sorted(names, key=final)


def roc_curves(results: Mapping[str, dict[str, Any]]) -> Figure | None:
    """The ROC curve of every stage."""
    curves = {stage: result["roc"] for stage, result in results.items() if result.get("roc")}
    if not curves:
        return None
    with _canvas() as (figure, axes):
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for stage in sorted(curves, key=lambda stage: -results[stage]["auc"]):
            x, y = curves[stage]["false_positive_rates"], curves[stage]["true_positive_rates"]
            label = f"{STAGE_TITLES[stage]}, AUC {results[stage]['auc']:.4f}"
            axes.plot(x, y, color=STAGE_COLORS[stage], label=label, zorder=2 if stage == "scratch" else 3)
        axes.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="false positive rate", ylabel="true positive rate")
        axes.legend(loc="lower right")
    return figure


def calibration_curves(results: Mapping[str, dict[str, Any]]) -> Figure | None:
    """Click rate against mean probability in bins of equally many rows."""
    bins = {stage: result["calibration_bins"] for stage, result in results.items()}
    bins = {stage: found for stage, found in bins.items() if found}
    if not bins:
        return None
    largest = max(max(one["mean_probability"], one["click_rate"]) for found in bins.values() for one in found)
    with _canvas() as (figure, axes):
        limit = min(1.0, 1.06 * largest)
        axes.plot([0, limit], [0, limit], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for stage in sorted(bins, key=lambda stage: abs((results[stage]["calibration"] or np.inf) - 1.0)):
            x = [one["mean_probability"] for one in bins[stage]]
            y = [one["click_rate"] for one in bins[stage]]
            ratio = results[stage]["calibration"]
            label = STAGE_TITLES[stage] + (f", mean p / mean y = {ratio:.3f}" if ratio else "")
            axes.plot(x, y, color=STAGE_COLORS[stage], marker="o", markersize=4, label=label)
        axes.set(xlim=(0, limit), ylim=(0, limit), xlabel="mean probability", ylabel="click rate")
        axes.legend(loc="upper left")
    return figure


def slice_bars(results: Mapping[str, dict[str, Any]]) -> Figure | None:
    """AUC of every slice, one bar a stage, from chance upward."""
    slices = {
        name: part
        for name, part in slices_of(results).items()
        if any(result["slices"].get(name, {}).get("auc") is not None for result in results.values())
    }
    if not slices:
        return None
    names, stages = list(slices), list(results)
    thickness = 0.8 / len(stages)
    values = [
        result["slices"][n]["auc"] for result in results.values() for n in names if n in result["slices"]
    ]
    defined = [value for value in values if value is not None]
    with _canvas(height=1.0 + len(names) * max(0.54, 0.28 + 0.17 * len(stages))) as (figure, axes):
        for index, stage in enumerate(stages):
            for place, name in enumerate(names):
                auc = results[stage]["slices"].get(name, {}).get("auc")
                if auc is None:
                    continue
                y = place + (index - (len(stages) - 1) / 2) * thickness
                axes.barh(y, auc - 0.5, thickness * 0.86, left=0.5, color=STAGE_COLORS[stage])
                axes.annotate(
                    f"{auc:.3f}",
                    (max(auc, 0.5), y),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
            axes.barh([0], [0], color=STAGE_COLORS[stage], label=STAGE_TITLES[stage])
        axes.set_yticks(range(len(names)), [_slice_label(slices[name]) for name in names])
        axes.set_ylim(len(names) - 0.45, -0.55)
        low, high = min(0.5, *defined), max(0.55, *defined)
        axes.set_xlim(low - (0.01 if low < 0.5 else 0), high + 0.14 * (high - low))
        axes.axvline(0.5, color=MUTED, linewidth=1)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xlabel("AUC (bars start at chance, 0.5)")
        figure.legend(loc="outside upper right", ncols=len(stages))
    return figure


def _slice_label(part: Mapping[str, Any]) -> str:
    title = str(part["title"]).replace(" (", "\n(") if len(part["title"]) > 26 else part["title"]
    return f"{title}\n{part['n']:,} rows, {part['positives']:,} clicks"
