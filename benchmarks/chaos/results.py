"""What a campaign found, as a table for the terminal and as a page."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from benchmarks.chaos.plan import MOMENTS, VICTIMS, Trial
from benchmarks.chaos.running import RANKS, Verdict
from benchmarks.machine import how_made

_COLUMNS = ("trials", *(f"kills {name}" for name in VICTIMS), "resumed", "bit-identical", "rows exactly once")

_INTRODUCTION = """\
# Killed trainings: resumed, bit-identical, every row once

{how_made}

Joint training ({steps} steps on {ranks} ranks, dropout and noise on, a checkpoint every few steps, two kept)
is killed by SIGKILL when one rank comes to a moment, at a random occurrence of it. The kill takes this rank
*itself* or the *others*, and the launcher (`hetegen --ranks --max-restarts` or torchrun, by chance) starts
the ranks again; or it takes *all*, the launcher too, and the same command is given again. Each trial is
compared with one undisturbed training:

- *resumed*: the kills came, the training got to its end without further restarts, and no attempt trained
  again what a complete checkpoint had held before it;
- *bit-identical*: all tensors of the last checkpoint (weights and optimizer state), the state of the stage,
  which checkpoint is the best, and the final evaluation;
- *rows exactly once*: the steps that went into the final weights hold every training row once per epoch.
"""

_LIMITS = """\
SIGKILL ends processes, not the system: what they wrote stays in the page cache. So this says nothing about a
power failure.
"""


@dataclass(frozen=True)
class Result:
    """One trial and its verdict."""

    trial: Trial
    verdict: Verdict
    seconds: float
    """Time that it took."""


def table(results: Sequence[Result]) -> Table:
    """For the terminal."""
    shown = Table(title="Killed trainings")
    shown.add_column("moment")
    for column in _COLUMNS:
        shown.add_column(column, justify="right")
    for name, cells in _lines(results):
        shown.add_row(name, *cells)
    return shown


def page(results: Sequence[Result], arguments: Sequence[str], steps: int) -> str:
    """Markdown with the same table.

    Args:
        results: of all trials.
        arguments: that the campaign was started with.
        steps: of the reference.
    """
    made = how_made("benchmarks.chaos", arguments)
    lines = [
        *_INTRODUCTION.format(how_made=made, steps=steps, ranks=RANKS).splitlines(),
        "",
        f"| moment | what it is | {' | '.join(_COLUMNS)} |",
        f"|---|---|{'---:|' * len(_COLUMNS)}",
    ]
    for name, cells in _lines(results):
        lines.append(f"| {name} | {MOMENTS.get(name, '')} | {' | '.join(cells)} |")
    attempts = [result.verdict.attempts for result in results]
    counted = ", ".join(f"{attempts.count(count)} took {count}" for count in sorted(set(attempts)))
    launchers = [result.trial.launcher for result in results]
    ways = " and ".join(f"{name} {launchers.count(name)} times" for name in sorted(set(launchers)))
    lines += [
        "",
        f"Attempts that got as far as training: {sum(attempts)} in {len(attempts)} trials ({counted}).",
        f"The launcher was {ways}.",
        "",
        *_LIMITS.splitlines(),
        "",
    ]
    return "\n".join(lines)


def _lines(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """Cells by kind of trial, and of all."""
    by_moment = {name: [result for result in results if result.trial.moment == name] for name in MOMENTS}
    lines = [(name, _cells(some)) for name, some in by_moment.items() if some]
    return [*lines, ("all", _cells(results))]


def _cells(results: Sequence[Result]) -> list[str]:
    kills = [kill for result in results for kill in result.trial.kills]
    counts = [
        len(results),
        *(sum(kill.victims == name for kill in kills) for name in VICTIMS),
        sum(not result.verdict.resuming for result in results),
        sum(not result.verdict.bits for result in results),
        sum(not result.verdict.rows for result in results),
    ]
    return [str(count) for count in counts]
