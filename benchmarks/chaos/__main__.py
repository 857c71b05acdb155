"""Kills trainings at random moments: each must resume by itself and end with the same bits.

    python -m benchmarks.chaos --trials 30

What is killed, when and by whom follows from the seed and the index of the trial, so `--first 17 --trials 1`
repeats one. The directories of trials that failed stay, and the exit code is 1 then.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import mkdtemp

from benchmarks.chaos.plan import draw_trial
from benchmarks.chaos.records import read_passes
from benchmarks.chaos.results import Result, page, table
from benchmarks.chaos.running import RANKS, RunError, run_reference, run_trial
from benchmarks.chaos.verdict import Outcome
from hetegen_rec import terminal
from hetegen_rec.config.loading import load_config, save_config

CONFIG = "configs/synthetic.yaml"
OVERRIDES = (
    "data.source.rows=1502",  # 1201 to train: the lanes end in padding, and the last batch is not full
    "data.source.id_cardinality=300",
    "data.rows_per_group=300",
    "data.shuffle_rows=200",
    "model.dim=8",
    "model.denoiser.num_layers=1",
    "model.denoiser.dropout=0.1",
    "model.noise.kind=marginal",
    "model.ctr.hidden=[16]",
    "model.ctr.dropout=0.1",
    "train.batch_size=96",
    "train.eval_batch_size=96",
    "train.evaluations_per_epoch=2",
    "train.tensorboard=false",
    "stages.joint.epochs=3",
    "stages.joint.patience=null",
    "stages.joint.decay=cosine",
    "stages.joint.oov_dropout=2.0",
    "checkpoints.every_steps=4",
    "checkpoints.every_minutes=null",
    "checkpoints.keep=2",
)
"""Small, with everything on that a resumed training could get wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a campaign and writes its page; returns 1 if a trial failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    console = terminal.results()
    options.out.mkdir(parents=True, exist_ok=True)
    directory = Path(mkdtemp(prefix="chaos-", dir=options.out)).resolve()
    places = (f"data.raw_dir={directory}/raw", f"data.prepared_dir={directory}/prepared")
    config = load_config(CONFIG, [*OVERRIDES, *places, *options.overrides])
    save_config(config, directory / "config.yaml")
    try:
        reference = run_reference(directory / "reference")
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console.print(f"reference: {reference.steps} steps, {reference.epochs} x {reference.num_rows:,} rows")
    results = []
    indices = range(options.first, options.first + options.trials)
    for result in _results(directory, options.seed, indices, reference):
        console.print(_line(result), markup=False, highlight=False, soft_wrap=True)
        results.append(result)
    console.print(table(results))
    path = options.results or options.out / "chaos.md"
    path.write_text(page(results, given, reference.steps), encoding="utf-8")
    console.print(f"page: {path}")
    if any(result.verdict.problems for result in results):
        print(f"error: the failed trials are kept in {directory}", file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    return 0


def _results(directory: Path, seed: int, indices: Iterable[int], reference: Outcome) -> Iterator[Result]:
    """The trials as they end; the directories of those that failed stay."""
    passes = [read_passes(directory / "reference", rank) for rank in range(RANKS)]
    for index in indices:
        trial = draw_trial(seed, index, passes)
        place = directory / f"trial-{index}"
        start = time.monotonic()
        verdict = run_trial(trial, place, reference)
        yield Result(trial, verdict, time.monotonic() - start)
        if not verdict.problems:
            shutil.rmtree(place)


def _line(result: Result) -> str:
    trial, verdict = result.trial, result.verdict
    kills = ", then ".join(map(str, trial.kills))
    how = f"{verdict.attempts} attempts under {trial.launcher}, {result.seconds:.0f} s"
    return f"trial {trial.index}: {kills}; {how}: {'; '.join(verdict.problems) or 'ok'}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trials", type=int, default=30, metavar="N", help="how many (default: 30)")
    parser.add_argument("--first", type=int, default=0, metavar="I", help="index of the first (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="default: runs/chaos")
    parser.add_argument("--results", type=Path, help="page to write (default: OUT/chaos.md)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.pipeline=base")
    return parser


if __name__ == "__main__":
    sys.exit(main())
