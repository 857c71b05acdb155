"""One scenario: builds all variants, measures them turn by turn, and writes table and numbers.

python -m benchmarks.run step
torchrun --nproc-per-node 2 -m benchmarks.run balancing --repeats 5 train.batch_size=2048
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.throughput.arithmetic import Summary, summarise
from benchmarks.throughput.click_log import ClickLog, LogConfig, write_click_log
from benchmarks.throughput.jobs import keep_to_cores, slowest_turn_of_jobs
from benchmarks.throughput.limits import Bound, Limits, LimitsProbe, combine, count_flops
from benchmarks.throughput.page import Provenance, Result, write_results
from benchmarks.throughput.scenario import Case, Scenario, cases_of, load_scenario
from benchmarks.throughput.stopwatch import Turn, Workload
from benchmarks.throughput.workloads import FILLING_STEPS, MadeBatches, open_reader, open_workload
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.distributed.runtime import Runtime, start_runtime
from hetegen_rec.terminal import quiet_libraries


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
    if options.turn is not None:
        return _one_turn(scenario, cases, *options.turn)
    with_jobs = cases[0].ranks is not None
    with start_runtime(cases[0].config.distributed.device) as runtime:
        if with_jobs and runtime.world_size > 1:
            print(f"{options.scenario}: starts its ranks itself; run it without a launcher", file=sys.stderr)
            return 2
        result = run_jobs(scenario, cases, given) if with_jobs else run(scenario, cases, runtime)
        if runtime.is_main:
            name = Path(options.scenario).stem
            command = ["python", "-m", "benchmarks.run", *given]
            made = Provenance.here(command, runtime, with_jobs=with_jobs)
            for path in write_results(options.results or Path("runs/benchmarks") / name, name, result, made):
                print(f"wrote {path}", file=sys.stderr)
    return 0


def _one_turn(scenario: Scenario, cases: Sequence[Case], name: str, first_core: str, path: str) -> int:
    """What a job does for `run_jobs`: one turn of one variant, written to a file."""
    (case,) = (case for case in cases if case.name == name)
    keep_to_cores(int(first_core), case.ranks or 1)
    with start_runtime(case.config.distributed.device) as runtime, ExitStack() as stack:
        alone = scenario.model_copy(update={"repeats": 1, "limits": False})
        ((turn,),) = measure(alone, [case], stack, runtime)[0].values()
        turn = _slowest(turn, runtime)
        if runtime.is_main:
            turn.save(Path(path))
    return 0


def _parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", help="a scenario by name, see docs/benchmarks.md, or a .yaml file")
    parser.add_argument("overrides", nargs="*", help="key=value for all variants; `log.` for the rows")
    parser.add_argument("--repeats", type=_positive, help="rounds over all variants")
    parser.add_argument("--steps", type=_positive, help="timed steps of a variant in a round")
    parser.add_argument("--all", action="store_true", help="with the optional variants, which need much")
    parser.add_argument("--turn", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help="directory; default: runs/benchmarks/SCENARIO")
    return parser.parse_intermixed_args(given)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def run(scenario: Scenario, cases: Sequence[Case], runtime: Runtime) -> Result:
    """Measures all variants of a scenario in this job, interleaved. A collective."""
    with ExitStack() as stack:
        found, bounds = measure(scenario, cases, stack, runtime)
    turns = {name: [_slowest(turn, runtime) for turn in of_variant] for name, of_variant in found.items()}
    return _result(scenario, cases, turns, runtime.world_size, bounds)


def run_jobs(scenario: Scenario, cases: Sequence[Case], given: Sequence[str]) -> Result:
    """Measures variants that have ranks of their own, interleaved: every turn is a job."""
    turns_of = {
        case.name: partial(slowest_turn_of_jobs, case.name, case.ranks or 1, case.jobs, given)
        for case in cases
    }
    return _result(scenario, cases, interleave(turns_of, scenario.repeats, 0), 1, {})


def measure(
    scenario: Scenario, cases: Sequence[Case], stack: ExitStack, runtime: Runtime
) -> tuple[dict[str, list[Turn]], dict[str, Bound]]:
    """The turns of this rank, and what bounds its steps if the scenario wants that; by variant. A collective.

    Args:
        scenario: says how many.
        cases: the variants.
        stack: closes what was opened.
        runtime: this process's view of the job.
    """
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
    logs = _write_logs(cases, directory, runtime)
    workloads: dict[str, Workload] = {}
    for number, case in enumerate(cases):
        place = directory / f"variant-{number}"
        workloads[case.name] = open_workload(case, logs[case.log], scenario.steps, place, stack, runtime)
    turns_of = {name: workload.turn for name, workload in workloads.items()}
    probes = {case.log: _open_probe(case, logs[case.log], runtime) for case in cases if scenario.limits}
    limits: dict[LogConfig, list[Limits]] = {log: [] for log in probes}

    def between() -> None:
        for log, probe in probes.items():
            limits[log].append(probe.measure())

    turns = interleave(turns_of, scenario.repeats, scenario.warm_rounds, between)
    if not scenario.limits:
        return turns, {}
    batches = scenario.steps + FILLING_STEPS
    flops = {case.name: count_flops(workloads[case.name]) / batches for case in cases}
    return turns, {case.name: Bound(combine(limits[case.log]), flops[case.name]) for case in cases}


def _result(
    scenario: Scenario,
    cases: Sequence[Case],
    turns: Mapping[str, Sequence[Turn]],
    ranks: int,
    bounds: dict[str, Bound],
) -> Result:
    summaries: dict[str, Summary] = {}
    for case in cases:
        lanes = case.config.data.lanes or case.ranks or ranks
        rows = case.config.train.batch_size // lanes * lanes
        summaries[case.name] = summarise(turns[case.name], rows, scenario.typical)
    return Result(scenario, summaries, {case.name: case.against for case in cases}, bounds)


def interleave(
    turns_of: Mapping[str, Callable[[], Turn]],
    repeats: int,
    warm_rounds: int,
    between: Callable[[], None] = lambda: None,
) -> dict[str, list[Turn]]:
    """The turns of all variants, A B C, B C A, C A B ..., so that what the machine does else hits all alike,
    and none gains by its place in a round.

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
    names = list(turns_of)
    for _ in range(repeats):
        for name in names:
            turns[name].append(turns_of[name]())
        names = [*names[1:], names[0]]
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
    (batch,) = MadeBatches(open_reader(case, log, runtime), 1).batches
    keys = len(batch.kjt.keys())
    rows = log.statistics.table_rows(log.config.names[0])
    # Each field has its part of the table, as it has a table of its own in the model.
    ids = (batch.ids.clamp(min=0) + batch.ids.new_tensor(range(keys)) * rows).flatten()
    return LimitsProbe(ids, rows * keys, case.config.model.dim)
