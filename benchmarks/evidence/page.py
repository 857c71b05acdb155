"""evidence.md and report.html: the same sections for a repository and for a browser."""

import html
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.tables import Section
from hetegen_rec.evaluation.page import html_page, plot, plots
from hetegen_rec.files import write_whole

TITLE = "Evidence: methods against each other"
MARKDOWN, HTML = "evidence.md", "report.html"
_WIDTH = 118
_STYLE = """main { max-width: 1320px; } th, td { padding-left: 8px; padding-right: 8px; }
p.about, h2 + p.about { margin: 0 0 18px; color: var(--muted); max-width: 78ch; }
h2 + p.verdict { color: var(--ink); max-width: 62ch; }
tr.block td { padding-top: 16px; color: var(--muted); font-weight: 600; }
"""
"""Beside the style of a run's report: room for a column a data set, and blocks of rows."""


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
        if section.verdict:
            lines += ["", *_wrapped(f"**{section.verdict}**")]
        if section.words:
            lines += ["", *_wrapped(section.words)]
        for table in section.tables:
            lines += ["", *table.markdown()]
    return "\n".join([*lines, ""])


def to_html(introduction: str, sections: Sequence[Section]) -> str:
    """Everything, in the style of a run's report."""
    body = "\n".join(_section(section) for section in sections)
    return html_page(TITLE, "benchmark", f"<p>{html.escape(introduction)}</p>", body, more_style=_STYLE)


def _section(section: Section) -> str:
    verdict = f'<p class="verdict">{html.escape(section.verdict)}</p>' if section.verdict else ""
    said = f'<p class="about">{html.escape(section.words)}</p>' if section.words else ""
    tables = "\n".join(table.html() for table in section.tables)
    shown = plots(section.plots) if len(section.plots) > 1 else "".join(map(plot, section.plots))
    return f"<section>\n<h2>{html.escape(section.title)}</h2>{verdict}{said}\n{tables}\n{shown}\n</section>"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False)
