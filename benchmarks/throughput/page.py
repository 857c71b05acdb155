"""Results as numbers (JSON) and as a table (Markdown), with what they were made on."""

import json
import os
import platform
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.tables import Table
from benchmarks.machine import commit, processor
from benchmarks.throughput.arithmetic import Ratio, Summary
from benchmarks.throughput.limits import Bound
from benchmarks.throughput.scenario import Scenario
from hetegen_rec.distributed.runtime import Runtime

_PACKAGES = ("torch", "torchrec", "pyarrow", "numpy")
_WIDTH = 115
_HEADING = (
    "variant",
    "ratio",
    "least to most",
    "relative to",
    "samples/s",
    "step ms",
    "P50",
    "P90",
    "P99",
    "CPU ms",
)
_BOUNDS = (
    "variant",
    "gather GB/s",
    "products GFLOP/s",
    "table rows of a batch, MB",
    "products of a step, GFLOP",
    "bound ms",
    "reached",
)


@dataclass(frozen=True)
class Result:
    """What was found for one scenario."""

    scenario: Scenario
    summaries: dict[str, Summary]
    """By variant."""
    bases: dict[str, str]
    """By variant, the one that its ratio is relative to."""
    bounds: dict[str, Bound]
    """By variant, where the scenario wants limits."""

    def ratio_of(self, variant: str) -> Ratio:
        """Time of a step, relative to that of the variant's base."""
        return self.summaries[variant].ratio_to(self.summaries[self.bases[variant]])


@dataclass(frozen=True)
class Provenance:
    """How, on what and by what code numbers were made."""

    command: str
    commit: str
    date: str
    processor: str
    cores: int
    ranks: int | None
    """None: those of each variant."""
    threads: int
    """Of a rank."""
    device: str
    system: str
    python: str
    versions: dict[str, str]
    load: float
    """Of the machine over the last five minutes."""

    @classmethod
    def here(cls, command: Sequence[str], runtime: Runtime, *, with_jobs: bool) -> "Provenance":
        """Of this process, or `with_jobs` of those that it started, whose ranks have a thread each."""
        launcher = ["torchrun", "--nproc-per-node", str(runtime.world_size)]
        return cls(
            command=" ".join(command if runtime.world_size == 1 else [*launcher, *command[1:]]),
            commit=commit(),
            date=date.today().isoformat(),
            processor=processor(),
            cores=os.cpu_count() or 1,
            ranks=None if with_jobs else runtime.world_size,
            threads=1 if with_jobs else torch.get_num_threads(),
            device=str(runtime.device),
            system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            versions={name: version(name) for name in _PACKAGES},
            load=round(os.getloadavg()[1], 1),
        )

    def sentence(self) -> str:
        """For a page."""
        ranks = "ranks by variant" if self.ranks is None else f"{self.ranks} rank(s)"
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            f"`{self.command}` at commit {self.commit}, {self.date}, {ranks} with "
            f"{self.threads} thread(s) each on {self.device}, {self.cores} cores of {self.processor}, "
            f"{self.system}, Python {self.python}, {versions}. Load of the machine over the "
            f"last five minutes: {self.load}."
        )


def write_results(directory: Path, name: str, result: Result, made: Provenance) -> list[Path]:
    """Writes and prints what was found for a scenario; see `write_page`."""
    return write_page(directory, name, as_json(name, result, made), page(name, result), made)


def write_page(
    directory: Path, name: str, numbers: Mapping[str, Any], lines: Iterable[str], made: Provenance
) -> list[Path]:
    """Writes `NAME.json` and `NAME.md`, and prints the latter; returns their paths.

    Args:
        directory: where to.
        name: of both files.
        numbers: for the first.
        lines: of the second, without what it was made on.
        made: what it was made on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    json_path, page_path = directory / f"{name}.json", directory / f"{name}.md"
    json_path.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    text = "\n".join([*lines, "", *wrapped(made.sentence())]) + "\n"
    page_path.write_text(text, encoding="utf-8")
    print(text)
    return [json_path, page_path]


def as_json(name: str, result: Result, made: Provenance) -> dict[str, Any]:
    """Everything, for programs."""
    return {
        "scenario": name,
        "definition": result.scenario.model_dump(mode="json"),
        "made": asdict(made),
        "variants": [
            {
                "name": variant,
                "rows_per_second": summary.rows_per_second,
                "seconds": summary.step,
                "ratio": asdict(result.ratio_of(variant)),
                "relative_to": result.bases[variant],
                **asdict(summary),
                "bound": _bound_as_json(result.bounds.get(variant)),
            }
            for variant, summary in result.summaries.items()
        ],
    }


def page(name: str, result: Result) -> Iterator[str]:
    """Markdown lines, without what they were made on."""
    scenario = result.scenario
    yield f"# {name}"
    yield ""
    yield from wrapped(scenario.question)
    if scenario.goal:
        yield ""
        yield from wrapped(f"Goal: {scenario.goal}")
    yield ""
    yield from Table(_HEADING, [_row(result, variant) for variant in result.summaries]).markdown()
    yield ""
    yield from wrapped(
        f"Ratio: time of a step relative to the variant beside it, the median of {scenario.repeats} repeats "
        f"in each of which every variant had its turn. A repeat counts with the {scenario.typical} of its "
        "steps, and `step ms` and samples/s are the median of these. P50, P90 and P99 are of single steps, "
        "all repeats together. `CPU ms` is what a step takes of all threads of one rank."
    )
    if result.bounds:
        yield ""
        yield from Table(_BOUNDS, [_bound_row(result, variant) for variant in result.bounds]).markdown()
        yield ""
        yield from wrapped(
            "Limits, measured in the same repeats: the bytes a second that a plain gather of a batch's rows "
            "reads from one table as large as all, and float32 products of square matrices. Bound: the "
            "operations of a step's matrix products at the one rate, and after them three passes over its "
            "table rows (read; read and written by the update) at the other. Reached: the bound as a share "
            "of `step ms`; what is missing is all that is neither, such as activations, normalisations, "
            "gradients that are copied, and Python."
        )


def _bound_row(result: Result, name: str) -> list[str]:
    bound, step = result.bounds[name], result.summaries[name].step
    return [
        f"`{name}`",
        f"{bound.limits.gather_bytes_per_second / 1e9:.2f}",
        f"{bound.limits.gemm_flops_per_second / 1e9:.0f}",
        f"{bound.limits.batch_bytes / 1e6:.1f}",
        f"{bound.flops / 1e9:.2f}",
        f"{1e3 * bound.seconds:.1f}",
        f"{bound.seconds / step:.2f}",
    ]


def _bound_as_json(bound: Bound | None) -> dict[str, Any] | None:
    return None if bound is None else {**asdict(bound), "seconds": bound.seconds}


def _row(result: Result, name: str) -> list[str]:
    summary, ratio = result.summaries[name], result.ratio_of(name)
    times = (summary.step, summary.p50, summary.p90, summary.p99, summary.cpu_seconds)
    return [
        f"`{name}`",
        f"{ratio.median:.3f}",
        f"{ratio.least:.3f} to {ratio.most:.3f}",
        f"`{result.bases[name]}`",
        f"{summary.rows_per_second:,.0f}",
        *(f"{1e3 * value:.2f}" for value in times),
    ]


def wrapped(text: str) -> list[str]:
    """Lines of a paragraph."""
    return textwrap.wrap(text, _WIDTH, break_on_hyphens=False)
