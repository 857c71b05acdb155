"""One scenario: builds all variants, measures them turn by turn, and writes table and numbers.

python -m benchmarks.run step
torchrun --nproc-per-node 2 -m benchmarks.run balancing --repeats 5 train.batch_size=2048
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.throughput.arithmetic import Summary, summarise
from benchmarks.throughput.click_log import ClickLog, LogConfig, write_click_log
from benchmarks.throughput.limits import Limits, LimitsProbe, combine
from benchmarks.throughput.page import Provenance, Result, write_results
from benchmarks.throughput.scenario import Case, Scenario, cases_of, load_scenario
from benchmarks.throughput.stopwatch import Turn
from benchmarks.throughput.workloads import MadeBatches, open_reader, open_workload
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.terminal import quiet_libraries
from hetegen_rec.training.setup import rows_per_step


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes; returns an exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(given)
    quiet_libraries()
    try:
        scenario = load_scenario(options.scenario)
        changed = {name: value for name in ("repeats", "steps") if (value := getattr(options, name))}
        scenario = scenario.model_copy(update=changed)
        cases = cases_of(scenario, options.overrides, with_optional=options.all)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    with start_runtime(cases[0].config.distributed.device) as runtime:
        result = run(scenario, cases, runtime)
        if runtime.is_main:
            name = Path(options.scenario).stem
            made = Provenance.here(["python", "-m", "benchmarks.run", *given], runtime)
            for path in write_results(options.results or Path("runs/benchmarks") / name, name, result, made):
                print(f"wrote {path}", file=sys.stderr)
    return 0


def _parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", help="name of a file in benchmarks/throughput/scenarios, or a .yaml file")
    parser.add_argument("overrides", nargs="*", help="key=value for all variants; `log.` for the rows")
    parser.add_argument("--repeats", type=int, help="rounds over all variants")
    parser.add_argument("--steps", type=int, help="timed steps of a variant in a round")
    parser.add_argument("--all", action="store_true", help="with the optional variants, which need much")
    parser.add_argument("--results", type=Path, help="directory; default: runs/benchmarks/SCENARIO")
    return parser.parse_intermixed_args(given)


def run(scenario: Scenario, cases: Sequence[Case], runtime: Runtime) -> Result:
    """Measures all variants of a scenario, interleaved. A collective."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        logs = _write_logs(cases, directory, runtime)
        turns_of: dict[str, Callable[[], Turn]] = {}
        for number, case in enumerate(cases):
            place = directory / f"variant-{number}"
            workload = open_workload(case, logs[case.log], scenario.steps, place, stack, runtime)
            turns_of[case.name] = workload.turn
        probe = _open_probe(cases[0], logs[cases[0].log], runtime) if scenario.limits else None
        limits: list[Limits] = []
        between = (lambda: limits.append(probe.measure())) if probe is not None else None
        turns = interleave(turns_of, scenario.repeats, scenario.warm_rounds, between)
    summaries: dict[str, Summary] = {}
    for case in cases:
        of_slowest = [_slowest(turn, runtime) for turn in turns[case.name]]
        summaries[case.name] = summarise(of_slowest, rows_per_step(case.config, runtime))
    return Result(scenario, summaries, combine(limits) if limits else None)


def interleave(
    turns_of: Mapping[str, Callable[[], Turn]],
    repeats: int,
    warm_rounds: int,
    between: Callable[[], None] | None = None,
) -> dict[str, list[Turn]]:
    """The turns of all variants, A B C A B C ..., so that what the machine does else hits all alike.

    Args:
        turns_of: by variant, what carries out one turn.
        repeats: rounds that count.
        warm_rounds: rounds before them, which are forgotten.
        between: called once at the end of each round that counts.
    """
    for _ in range(warm_rounds):
        for turn in turns_of.values():
            turn()
    turns: dict[str, list[Turn]] = {name: [] for name in turns_of}
    for _ in range(repeats):
        for name, turn in turns_of.items():
            turns[name].append(turn())
        if between is not None:
            between()
    return turns


def _slowest(turn: Turn, runtime: Runtime) -> Turn:
    """Each step as long as it took on the rank where it took longest. A collective."""
    of_ranks = runtime.gather(turn)
    steps = zip(*(one.seconds for one in of_ranks), strict=True)
    return Turn([max(step) for step in steps], max(one.cpu_seconds for one in of_ranks))


def _write_logs(cases: Sequence[Case], directory: Path, runtime: Runtime) -> dict[LogConfig, ClickLog]:
    """Every log that a variant needs, the same on every rank. A collective."""
    logs: dict[LogConfig, ClickLog] = {}
    for case in cases:
        if case.log not in logs:
            path = directory / f"log-{len(logs)}.parquet"
            with runtime.together("writing the rows"):
                logs[case.log] = write_click_log(case.log, path)
    return logs


def _open_probe(case: Case, log: ClickLog, runtime: Runtime) -> LimitsProbe:
    """Of the ids that the first batch of a variant looks up, in one table for all of its tables."""
    (batch,) = MadeBatches(open_reader(case.config, log, runtime), 1).batches
    keys = len(batch.kjt.keys())
    rows = log.statistics.table_rows(log.config.names[0])
    # Each field has its part of the table, as it has a table of its own in the model.
    ids = (batch.ids.clamp(min=0) + batch.ids.new_tensor(range(keys)) * rows).flatten()
    return LimitsProbe(ids, rows * keys, case.config.model.dim)
