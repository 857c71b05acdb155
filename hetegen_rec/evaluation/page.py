"""One self-contained HTML page: the frame, the style and the plots of all reports."""

import base64
import html
from collections.abc import Sequence
from importlib import resources

from hetegen_rec.evaluation.plots import to_svg
from hetegen_rec.evaluation.report_sections import PlotCard


def html_page(title: str, kind: str, header: str, body: str, *, more_style: str = "") -> str:
    """A whole page.

    Args:
        title: as plain text.
        kind: what sort of report it is, in a word or two, as plain text.
        header: HTML below the title.
        body: HTML of the sections, and of a footer.
        more_style: CSS beside that of every report.
    """
    style = resources.files("hetegen_rec.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    title = html.escape(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - hetegen_rec</title>
<style>
{style}{more_style}</style>
</head>
<body>
<main>
<header>
<p class="kind">hetegen_rec {html.escape(kind)}</p>
<h1>{title}</h1>
{header}
</header>
{body}
</main>
</body>
</html>
"""


def plots(cards: Sequence[PlotCard]) -> str:
    """Plots side by side; nothing without any."""
    if not cards:
        return ""
    return '<div class="plots">\n' + "\n".join(plot(card) for card in cards) + "\n</div>"


def plot(card: PlotCard) -> str:
    """One plot, as wide as its place."""
    title, caption = html.escape(card.title), html.escape(card.caption)
    # An image of its own keeps the ids inside one SVG apart from those of the others.
    source = base64.b64encode(to_svg(card.figure)).decode("ascii")
    image = f'<img alt="{title}" src="data:image/svg+xml;base64,{source}">'
    return f"<figure><h3>{title}</h3>{image}<figcaption>{caption}</figcaption></figure>"
