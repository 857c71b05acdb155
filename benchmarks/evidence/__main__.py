"""Compares methods over data sets and seeds, and writes the page.

    python -m benchmarks.evidence benchmarks/evidence.yaml

Finished runs are never repeated, killed ones go on where they were, and failed ones are tried again when the
same command is given again. Ctrl-C saves what is under way. docs/evidence.md says how it is measured.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.evidence.grid import load_grid
from benchmarks.evidence.page import MARKDOWN, write_page
from benchmarks.evidence.plan import Plan
from benchmarks.evidence.records import Ledger, Record
from benchmarks.evidence.running import execute, prepare
from benchmarks.evidence.sections import sections_of
from benchmarks.evidence.session import carry_out, stopping_on_signals
from benchmarks.evidence.summary import Summary
from benchmarks.evidence.workers import RunError, Workers
from benchmarks.machine import commit, machine
from hetegen_rec import terminal
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.evaluation.tables import number
from hetegen_rec.locks import LockedError, directory_lock

DATA_ROOT = Path("../shared/data")


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what is left of the grid and writes its page; 1 if a run failed, 2 if the grid is wrong."""
    options = _parser().parse_args(arguments)
    try:
        plan = Plan(load_grid(options.grid), options.out, options.data_root)
        if options.records or not options.page_only:
            with directory_lock(options.out):
                ledger = _take_over(options)
                if not options.page_only:
                    _run_all(plan, ledger, options)
        return _write(plan, options)
    except (ConfigError, LockedError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _take_over(options: argparse.Namespace) -> Ledger:
    """The records of `--out`, with the finished runs of `--records`."""
    ledger = Ledger(options.out)
    for path in options.records:
        _say(f"{_adopt(ledger, path)} finished runs taken over from {path}")
    return ledger


def _run_all(plan: Plan, ledger: Ledger, options: argparse.Namespace) -> None:
    """Prepares the data, then does every run that is left, until done or stopped."""
    workers, cores = Workers(), _cores(options.jobs)
    left = plan.num_left(ledger.done)
    for name, place in plan.missing.items():
        _say(f"{name} is left out: {place} is not there")
    _say(f"{left} of {plan.num_runs} runs left, {len(cores)} at a time")
    with stopping_on_signals(workers):
        for data_set in dict.fromkeys(run.data_set for run in plan.everything if left):
            log = options.out / "logs" / f"prepare-{data_set}.log"
            prepare(plan.first_run(data_set), workers, log, cores[0])
        do = partial(execute, out=options.out, workers=workers, commit=commit())
        carry_out(plan, ledger, do, cores, _tell)


def _adopt(ledger: Ledger, path: Path) -> int:
    try:
        return ledger.adopt(path)
    except OSError as error:
        raise ConfigError(f"--records {path}: cannot be read: {error.strerror}") from error


def _write(plan: Plan, options: argparse.Namespace) -> int:
    """Writes the page of what is there; returns 1 if runs failed."""
    ledger = Ledger(options.out)
    known = {run.id for run in plan.everything}
    failed = {run: record for run, record in ledger.failed.items() if run in known}
    sections = list(sections_of(Summary(plan, ledger.done, options.out), failed, options.out))
    paths = write_page(options.out, _introduction(plan, ledger, options.grid), sections)
    is_whole = not plan.missing and not plan.num_left(ledger.done)
    if options.results is not None and is_whole:
        options.results.write_text((options.out / MARKDOWN).read_text(encoding="utf-8"), encoding="utf-8")
    _say(f"page: {', '.join(map(str, paths))}")
    return 1 if failed else 0


def _cores(jobs: int | None) -> list[int]:
    """The core of every run at a time."""
    usable = sorted(os.sched_getaffinity(0))
    return [usable[i % len(usable)] for i in range(jobs or len(usable))]


def _tell(record: Record, num_left: int, seconds_left: float) -> None:
    what = f"{record.data_set} / {record.method} / {record.option} / seed {record.seed}"
    how = f"failed: {record.error}" if record.status == "failed" else _scored(record)
    _say(f"{what}: {how}; {num_left} left, about {seconds_left / 60:.0f} minutes")


def _scored(record: Record) -> str:
    if record.ways:
        scores = ", ".join(f"{number(one['auc'])} by {way}" for way, one in record.ways.items())
    else:
        scores = ", ".join(f"{number(record.value(one, 'auc'))} on {one}" for one in ("valid", "test"))
    return f"AUC {scores}; {record.wall_seconds:.0f} s"


def _introduction(plan: Plan, ledger: Ledger, grid: Path) -> str:
    done = [ledger.done[run.id] for run in plan.everything if run.id in ledger.done]
    commits = ", ".join(sorted({record.commit for record in done})) or "unknown"
    left = plan.num_left(ledger.done)
    state = "All runs are done." if not left else f"{left} of {plan.num_runs} runs are still to be done."
    missing = (
        f" Left out, because their files are not here: {', '.join(plan.missing)}." if plan.missing else ""
    )
    return (
        f"Made by python -m benchmarks.evidence {grid}; the runs were made at commit {commits}, each in one "
        f"process with one thread, on {machine()}. {state}{missing}"
    )


def _say(text: str) -> None:
    terminal.results().print(text, markup=False, highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("grid", type=Path, help="YAML file with data sets, methods and seeds")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/evidence"),
        help="runs, records and page (default: runs/evidence)",
    )
    parser.add_argument(
        "--data-root", type=Path, default=DATA_ROOT, metavar="DIR", help=f"data sets (default: {DATA_ROOT})"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one a core)")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="where the Markdown page goes too, once all runs are done",
    )
    parser.add_argument(
        "--records",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="results.jsonl of another directory or machine, whose finished runs count; may be repeated",
    )
    parser.add_argument(
        "--page-only", action="store_true", help="run nothing; write the page of what is there"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
