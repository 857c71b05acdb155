"""Where the forms of balancing spend the budget, on data of which the right answer is known.

    python -m benchmarks.allocation --seeds 3 --out benchmarks/results/allocation.md

Pre-trains on generated clicks (hetegen_rec/data/sources/synthetic.py) with every form. A form passes if with
every seed, at the end, no field of noise has more than an even share of the budget, and every field that is
hard but informative has more. A run that is done is not trained again.
"""

import argparse
import statistics
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hetegen_rec.config.balance import BalanceForm
from hetegen_rec.config.run import RunConfig
from hetegen_rec.data.sources.synthetic import EASY_FIELDS, HARD_FIELDS, NOISE_FIELDS
from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.evaluation.run_record import StageRecord, read_run
from hetegen_rec.terminal import quiet_libraries
from hetegen_rec.training.stages import run_stage

_WIDTH = 115
_CATEGORICAL = ("segment", "city", "category", *EASY_FIELDS, *HARD_FIELDS, "random_code")


@dataclass(frozen=True)
class Allocation:
    """What one run gave to each field."""

    end: Mapping[str, float]
    """By field: its share of the budget, w_f over the sum of w, at the last line of the log."""
    mean: Mapping[str, float]
    """By field: its share, mean over the lines of the log."""
    relative: Mapping[str, float]
    """By field: r at the last line."""

    @property
    def even(self) -> float:
        """The share of every field under uniform weights."""
        return 1.0 / len(self.end)

    @property
    def passes(self) -> bool:
        """Whether noise has no more than the even share at the end, and what is hard but informative more."""
        noise, hard = ([self.end[name] for name in names] for names in (NOISE_FIELDS, HARD_FIELDS))
        # The shares of `uniform` are even but for rounding.
        return max(noise) < 1.001 * self.even < min(hard)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is missing and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forms", nargs="+", default=list(get_args(BalanceForm)), metavar="FORM")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of 256 rows; an epoch has 625")
    parser.add_argument("--runs", type=Path, default=Path("runs/allocation"), help="where the runs go")
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args(arguments)
    quiet_libraries()
    found: dict[str, list[Allocation]] = {form: [] for form in options.forms}
    with start_runtime("cpu") as runtime:
        for seed in range(options.seeds):
            for form in options.forms:
                found[form].append(measure(form, seed, options.steps, options.runs, runtime))
    lines = list(report(found, options.steps))
    print("\n".join(lines))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def measure(form: str, seed: int, steps: int, directory: Path, runtime: Runtime) -> Allocation:
    """Pre-trains, where that is not done yet, and reads the log. Ends the program if it was asked to stop."""
    config = config_of(form, seed, steps, directory)
    if not run_stage(config, "pretrain", runtime):
        sys.exit("stopped before the end; the same command goes on")
    return allocation(read_run(config.run_dir).stages["pretrain"])


def config_of(form: str, seed: int, steps: int, directory: Path) -> RunConfig:
    """A small network, and few users and items, so that few steps tell."""
    values: dict[str, Any] = {
        "name": f"allocation-{form}",
        "run_dir": str(directory / f"{form}-{steps}" / f"seed-{seed}"),
        "seed": seed,
        "data": {
            "source": {"name": "synthetic", "rows": 200_000, "id_cardinality": 200},
            "raw_dir": str(directory / "raw"),
            "prepared_dir": str(directory / "prepared"),
        },
        "features": {
            "label": "label",
            "fields": [
                {"name": "user_id", "kind": "id"},
                {"name": "item_id", "kind": "id"},
                *({"name": name, "kind": "categorical"} for name in _CATEGORICAL),
                {"name": "price", "kind": "numeric"},
                {"name": "random_number", "kind": "numeric"},
            ],
        },
        "model": {"dim": 16, "denoiser": {"num_layers": 1}, "balance": {"form": form}},
        "train": {"batch_size": 256, "max_steps": steps, "log_every": 10, "tensorboard": False},
        "stages": {"pretrain": {"dense_lr": 5e-3}},
        "checkpoints": {"every_minutes": None, "keep": 1},
    }
    return RunConfig.model_validate(values)


def allocation(stage: StageRecord) -> Allocation:
    """What a pre-training gave to each field, by its log."""
    weights = {name: stage.field_series(name, "weight").y for name in stage.field_names}
    total = sum(weights.values())
    shares = {name: one / total for name, one in weights.items()}
    return Allocation(
        end={name: float(one[-1]) for name, one in shares.items()},
        mean={name: float(one.mean()) for name, one in shares.items()},
        relative={name: stage.field_series(name, "relative").last for name in stage.field_names},
    )


def report(found: Mapping[str, Sequence[Allocation]], steps: int) -> Iterator[str]:
    """Markdown lines."""
    runs = next(iter(found.values()))
    yield from ("# Where the forms of balancing spend the budget", "")
    yield from textwrap.wrap(
        f"Pre-training on synthetic clicks, {steps} steps of 256 rows, {len(runs)} seed(s). Share of a field "
        "in the sum of the weights, in percent, at the end / mean over the run. An even share is "
        f"{100 * runs[0].even:.1f}. Easy: {', '.join(EASY_FIELDS)}; hard but informative: "
        f"{', '.join(HARD_FIELDS)}; noise: mean of {', '.join(NOISE_FIELDS)}. A form passes if with every "
        "seed, at the end, no field of noise has more than the even share, and every field that is hard but "
        "informative has more. On the right, r at the end: of these fields, and the mean over all.",
        _WIDTH,
    )
    yield from ("", "| form | easy | hard | noise | passes | r easy | r hard | r noise | r of all |")
    yield "|---|---|---|---|---|---|---|---|---|"
    for form, one in found.items():
        yield f"| `{form}` | {' | '.join(_cells(one))} |"


def _cells(runs: Sequence[Allocation]) -> Iterator[str]:
    groups: tuple[Sequence[str], ...] = (EASY_FIELDS, HARD_FIELDS, NOISE_FIELDS)
    for names in groups:
        end, mean = (_mean([getattr(run, what) for run in runs], names) for what in ("end", "mean"))
        yield f"{100 * end:.1f} / {100 * mean:.1f}"
    num_passed = sum(run.passes for run in runs)
    yield "**yes**" if num_passed == len(runs) else f"no ({num_passed} of {len(runs)})"
    for names in (*groups, tuple(runs[0].relative)):
        yield f"{_mean([run.relative for run in runs], names):.3f}"


def _mean(values: Sequence[Mapping[str, float]], names: Sequence[str]) -> float:
    return statistics.mean(one[name] for one in values for name in names)


if __name__ == "__main__":
    sys.exit(main())
