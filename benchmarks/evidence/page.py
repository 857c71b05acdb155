"""evidence.md and report.html: the same sections for a repository and for a browser."""

import base64
import html
import textwrap
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from benchmarks.evidence.sections import Section
from hetegen_rec.evaluation.plots import to_svg
from hetegen_rec.evaluation.report_sections import PlotCard
from hetegen_rec.files import write_whole

TITLE = "Evidence: methods against each other"
MARKDOWN, HTML = "evidence.md", "report.html"
_WIDTH = 118
_WIDER = "main { max-width: 1320px; } th, td { padding-left: 8px; padding-right: 8px; }"
"""Beside the style of a run's report: room for a column a data set."""


def write_page(directory: Path, introduction: str, sections: Sequence[Section]) -> list[Path]:
    """Writes both; the HTML needs no other file and no network."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / MARKDOWN, directory / HTML]
    write_whole(paths[0], to_markdown(introduction, sections))
    write_whole(paths[1], to_html(introduction, sections))
    return paths


def to_markdown(introduction: str, sections: Sequence[Section]) -> str:
    """Tables and words, without plots."""
    lines = [f"# {TITLE}", "", *_wrapped(introduction)]
    for section in sections:
        lines += ["", f"## {section.title}"]
        if section.words:
            lines += ["", *_wrapped(section.words)]
        for table in section.tables:
            lines += ["", *table.markdown()]
    return "\n".join([*lines, ""])


def to_html(introduction: str, sections: Sequence[Section]) -> str:
    """Everything, in the style of a run's report."""
    style = resources.files("hetegen_rec.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(_section(section) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{TITLE} - hetegen_rec</title>
<style>
{style}{_WIDER}
</style>
</head>
<body>
<main>
<header>
<p class="kind">hetegen_rec benchmark</p>
<h1>{TITLE}</h1>
<p>{html.escape(introduction)}</p>
</header>
{body}
</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    said = f"<p>{html.escape(section.words)}</p>" if section.words else ""
    tables = "\n".join(table.html() for table in section.tables)
    plots = "\n".join(_card(card) for card in section.plots)
    if len(section.plots) > 1:
        plots = f'<div class="plots">\n{plots}\n</div>'
    return f"<section>\n<h2>{html.escape(section.title)}</h2>{said}\n{tables}\n{plots}\n</section>"


def _card(card: PlotCard) -> str:
    title, caption = html.escape(card.title), html.escape(card.caption)
    source = base64.b64encode(to_svg(card.figure)).decode("ascii")
    image = f'<img alt="{title}" src="data:image/svg+xml;base64,{source}">'
    return f"<figure><h3>{title}</h3>{image}<figcaption>{caption}</figcaption></figure>"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
