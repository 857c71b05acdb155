"""Shipped configurations over several seeds, fine-tuned against from-scratch.

    python -m benchmarks.shipped_configs configs/frappe.yaml configs/movielens_100k.yaml --seeds 3

Each seed trains in one process under OUT/NAME/seed-N; a stage that is done under the same configuration is
not trained again. The table is made from the evaluation.json files alone (`--table-only` makes just that).
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hetegen_rec.cli import main as hetegen
from hetegen_rec.config.loading import load_config
from hetegen_rec.evaluation.results import read_evaluation

SCORED = ("finetune", "scratch")
METRICS = {"auc": "AUC", "gauc": "GAUC", "log_loss": "LogLoss"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is missing and prints the table; the exit code of the first run that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", help="YAML files with data that is at hand")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/shipped_configs"))
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args(arguments)
    if not options.table_only:
        for config in options.configs:
            for seed in range(options.seeds):
                code = _train(config, options.out, seed)
                if code:
                    return code
    names = [load_config(config).name for config in options.configs]
    print("\n".join(table(options.out, names, options.seeds)))
    return 0


def _train(config: str, out: Path, seed: int) -> int:
    run_dir = out / load_config(config).name / f"seed-{seed}"
    return hetegen(["demo", "--config", config, f"seed={seed}", f"run_dir={run_dir}"])


def table(out: Path, names: Sequence[str], seeds: int) -> list[str]:
    """Markdown lines: test metrics, mean and standard deviation over seeds."""
    lines = [
        "| data set | stage | seeds | valid AUC | test AUC | GAUC | LogLoss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        for stage in SCORED:
            found = [read_evaluation(out / name / f"seed-{seed}" / stage) for seed in range(seeds)]
            splits: list[dict[str, Any]] = [one["splits"] for one in found if one is not None]
            if not splits:
                continue
            cells = [_mean_and_deviation([one["valid"]["auc"] for one in splits])]
            cells += [_mean_and_deviation([one["test"][metric] for one in splits]) for metric in METRICS]
            lines.append(f"| {name} | {stage} | {len(splits)} | {' | '.join(cells)} |")
    return lines


def _mean_and_deviation(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "n/a"
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return f"{statistics.mean(known):.4f} ± {deviation:.4f}"


if __name__ == "__main__":
    sys.exit(main())
