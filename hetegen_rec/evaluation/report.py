"""report.html: one self-contained page with what a run directory holds, for people."""

import html
import logging
from pathlib import Path

from hetegen_rec.evaluation.errors import EvaluationError
from hetegen_rec.evaluation.page import html_page, plots
from hetegen_rec.evaluation.report_sections import Section, sections_of
from hetegen_rec.evaluation.report_words import verdict
from hetegen_rec.evaluation.results import STAGE_TITLES, compare_with_scratch, headline_split
from hetegen_rec.evaluation.run_record import RunRecord, read_run
from hetegen_rec.files import write_whole

logger = logging.getLogger(__name__)

FILE_NAME = "report.html"


def write_report(run_dir: str | Path) -> Path:
    """Writes report.html beside the stages of a run; parts that are missing are left out.

    Args:
        run_dir: directory with one directory a stage, holding any of log.jsonl, evaluation.json,
            config.yaml and predictions/<split>/*.parquet.

    Returns:
        Path of the report, which needs no other file and no network.

    Raises:
        EvaluationError: no stage left a trace there, or its results are damaged.
    """
    record = read_run(run_dir)
    if not record.stages:
        raise EvaluationError(f"{run_dir}: no stage has a log or an evaluation yet; train one first")
    path = Path(run_dir) / FILE_NAME
    write_whole(path, render(record))
    logger.info("report written to %s", path)
    return path


def render(record: RunRecord) -> str:
    """The page of a run."""
    split = headline_split(record.evaluations)
    comparisons = compare_with_scratch(record.run_dir, record.evaluations, split)
    stages = ", ".join(STAGE_TITLES[name].lower() for name in record.stages)
    body = "\n".join(_section(section) for section in sections_of(record, split, comparisons))
    return html_page(
        record.name,
        "run",
        f'<p class="verdict">{html.escape(verdict(record, split, comparisons))}</p>',
        f"{body}\n<footer>Stages in this report: {stages}.</footer>",
    )


def _section(section: Section) -> str:
    heading = f"<h2>{html.escape(section.title)}</h2>" if section.title else ""
    words = f"<p>{html.escape(section.words)}</p>" if section.words else ""
    return f"<section>\n{heading}{words}\n{section.blocks}\n{plots(section.plots)}\n</section>"
