"""What `hetegen plan` found, as a picture and a self-contained page."""

import html
import io
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from hetegen_rec.evaluation.capacity import (
    COLLECTIVES,
    LINKS,
    MEMORY_PARTS,
    NOT_MEASURED,
    TIME_PARTS,
    CapacityReport,
    capacity_tables,
    throughput_text,
)
from hetegen_rec.evaluation.page import html_page, plot
from hetegen_rec.evaluation.plots import INK, MUTED, STYLE
from hetegen_rec.evaluation.report_sections import PlotCard
from hetegen_rec.files import write_whole

_PART_COLORS = ("#2459a9", "#7f9fd0", "#5c4fb0", "#1f8a70", "#c9822b", "#e3bf8f", "#8b909a", "#d3d7de")
_TIME_COLORS = ("#1f8a70", "#2459a9", "#e3bf8f", "#c9822b", "#b3423a", "#5c4fb0", "#8b909a", "#22262e")
_LINK_COLORS = {"intra_host": "#2459a9", "inter_host": "#b3423a", "host_device": "#c9822b"}
_GB, _MB = 1e9, 1e6
_PNG_DPI = 150
_WIDTH_OF_TABLES = 150


def write_capacity(report: CapacityReport, directory: Path) -> None:
    """Writes plan.json, plan.png and plan.html."""
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / "plan.json", json.dumps(report.as_json(), indent=1))
    figure = draw(report)
    with mpl.rc_context(STYLE):
        figure.savefig(directory / "plan.png", dpi=_PNG_DPI, metadata={"Software": None})
    write_whole(directory / "plan.html", _page(report, figure))


def draw(report: CapacityReport) -> Figure:
    """Memory by rank, bytes by link and time by part, one above the other."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 10.5), layout="constrained")
        title = (
            f"{report.run}: {report.stage} on {report.world} {report.hardware}, "
            f"batch size {report.batch_size:,}"
        )
        figure.suptitle(f"{title}\nestimates, not measured", color=INK)
        memory, traffic, time = figure.subplots(3, 1, gridspec_kw={"height_ratios": [3, 2.3, 1.3]})
        _draw_memory(memory, report)
        _draw_traffic(traffic, report)
        _draw_time(time, report)
    return figure


def _draw_memory(axes: Axes, report: CapacityReport) -> None:
    ranks = range(len(report.memory))
    bottom = [0.0] * len(report.memory)
    for (part, title), color in zip(MEMORY_PARTS.items(), _PART_COLORS, strict=True):
        heights = [getattr(one, part) / _GB for one in report.memory]
        if max(heights) > 0:
            axes.bar(ranks, heights, bottom=bottom, color=color, label=title, width=0.8)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.axhline(report.cap / _GB, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="cap")
    axes.set(title="Memory per rank", xlabel="rank", ylabel="GB")
    axes.grid(visible=False, axis="x")
    if len(ranks) <= 32:
        axes.set_xticks(list(ranks))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_traffic(axes: Axes, report: CapacityReport) -> None:
    names = list(report.traffic)
    height = 0.8 / len(LINKS)
    for number, (link, title) in enumerate(LINKS.items()):
        sent = [getattr(report.traffic[name], link) / _MB for name in names]
        if not any(sent):
            continue
        places = [place + (number - 1) * height for place in range(len(names))]
        axes.barh(places, sent, height=height, color=_LINK_COLORS[link], label=title)
        for place, value in zip(places, sent, strict=True):
            if value:
                axes.text(value, place, f" {value:,.1f}", va="center", fontsize=8, color=MUTED)
    axes.set(title="Bytes of a step through the busiest rank", xlabel="MB")
    axes.set_yticks(range(len(names)), [COLLECTIVES[name] for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_time(axes: Axes, report: CapacityReport) -> None:
    steps = [(f"{report.batch_size:,} rows", report.time)]
    if report.time_of_largest is not None and report.largest_batch != report.batch_size:
        steps.append((f"{report.largest_batch:,} rows\n(largest that fits)", report.time_of_largest))
    colors = dict(zip(TIME_PARTS, _TIME_COLORS, strict=True))
    for place, (_, time) in enumerate(steps):
        left = 0.0
        for part in report.time_parts:
            share = getattr(time, part) / time.serial
            label = TIME_PARTS[part] if place == 0 else None
            axes.barh(place, 100 * share, left=left, color=colors[part], label=label, height=0.6)
            left += 100 * share
        text = f" {1e3 * time.overlapped:,.1f} to {1e3 * time.serial:,.1f} ms"
        axes.text(100, place, text, va="center", fontsize=8.5, color=MUTED)
    axes.set(title="Time of a step", xlabel="% of the time without overlap", xlim=(0, 122))
    axes.set_xticks(range(0, 101, 20))
    axes.set_yticks(range(len(steps)), [name for name, _ in steps])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _page(report: CapacityReport, figure: Figure) -> str:
    console = Console(record=True, width=_WIDTH_OF_TABLES, file=io.StringIO())
    console.print(capacity_tables(report))
    tables = html.escape(console.export_text())
    card = PlotCard("Memory, traffic and time", figure, "By rank, by link and by part of a step.")
    header = f'<p class="verdict">{html.escape(throughput_text(report))} {html.escape(NOT_MEASURED)}</p>'
    body = f"{plot(card)}\n<h2>Tables</h2>\n<pre>{tables}</pre>"
    return html_page(report.run, "capacity plan", header, body)
