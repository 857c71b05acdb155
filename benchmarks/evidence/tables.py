"""Parts of the page, and tables that are told twice: as Markdown and as HTML."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hetegen_rec.evaluation.report_sections import PlotCard


@dataclass(frozen=True)
class Cell:
    """Text of a cell."""

    text: str
    is_best: bool = False
    """Set in bold."""
    note: str = ""
    """Set beside it, smaller."""

    def markdown(self) -> str:
        """Text with its emphasis."""
        shown = f"**{self.text}**" if self.is_best else self.text
        return " ".join(part for part in (shown, self.note) if part).replace("|", "\\|")

    def html(self) -> str:
        """A `td` in the style of `report.css`."""
        kind = ' class="best"' if self.is_best else ""
        note = f' <span class="note">{html.escape(self.note)}</span>' if self.note else ""
        return f"<td{kind}>{html.escape(self.text)}{note}</td>"


Row: TypeAlias = Sequence[Cell | str]


@dataclass(frozen=True)
class Block:
    """In the place of a row: what the rows below are."""

    title: str


@dataclass(frozen=True)
class Table:
    """Named rows under a heading, whose first entry says what the rows are."""

    heading: Sequence[str]
    rows: Sequence[Row | Block]

    def markdown(self) -> list[str]:
        """Lines."""
        aligned = ["---", *["---:"] * (len(self.heading) - 1)]
        lines = [self.heading, aligned, *map(self._markdown_row, self.rows)]
        return [f"| {' | '.join(line)} |" for line in lines]

    def html(self) -> str:
        """A card of `report.css`."""
        heading = "".join(f"<th>{html.escape(title)}</th>" for title in self.heading)
        rows = "\n".join(map(self._html_row, self.rows))
        return f'<div class="card"><table>\n<tr>{heading}</tr>\n{rows}\n</table></div>'

    def _markdown_row(self, row: Row | Block) -> list[str]:
        if isinstance(row, Block):
            return [f"*{row.title}*", *[""] * (len(self.heading) - 1)]
        return [_cell(one).markdown() for one in row]

    def _html_row(self, row: Row | Block) -> str:
        if isinstance(row, Block):
            return f'<tr class="block"><td colspan="{len(self.heading)}">{html.escape(row.title)}</td></tr>'
        return f"<tr>{''.join(_cell(one).html() for one in row)}</tr>"


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    words: str = ""
    verdict: str = ""
    """What it amounts to, before everything else."""
    tables: Sequence[Table] = ()
    plots: Sequence[PlotCard] = ()
    """In HTML only."""


def _cell(value: Cell | str) -> Cell:
    return Cell(value) if isinstance(value, str) else value
