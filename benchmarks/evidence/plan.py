"""The runs that a grid asks for, and which of them comes next."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from benchmarks.evidence.grid import Grid, as_arguments
from benchmarks.evidence.identity import decisive, digest
from benchmarks.evidence.places import Places
from benchmarks.evidence.records import Record
from benchmarks.evidence.sequences import SequenceRun, sequence_runs
from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.loading import load_config
from hetegen_rec.config.run import RunConfig, Stage

SEARCH_SEED = 0


@dataclass(frozen=True)
class Run:
    """One method, trained and evaluated on one data set with one seed."""

    data_set: str
    method: str
    option: str
    """Which of the data set's settings to choose among."""
    seed: int
    config_path: str
    config: RunConfig = field(repr=False)
    """As it trains."""
    scoring: RunConfig = field(repr=False)
    """As it scores."""
    stages: tuple[Stage, ...]
    overrides: tuple[str, ...] = field(repr=False)
    """`key=value` that train it."""
    evaluate: tuple[str, ...] = field(repr=False)
    """More of them, that hold only when it scores."""
    training_id: str = ""
    """Digest of what decides about the weights."""
    id: str = ""
    """Digest of that and of what decides about the scores."""

    @property
    def click_stage(self) -> Stage:
        """The stage that scores."""
        return self.stages[-1]

    def __str__(self) -> str:
        return f"{self.data_set} / {self.method} / {self.option} / seed {self.seed}"


AnyRun: TypeAlias = Run | SequenceRun


class Plan:
    """All runs of a grid."""

    def __init__(self, grid: Grid, out: Path, data_root: Path) -> None:
        """Resolves the configuration of every run, so that a mistake shows before anything is trained.

        Args:
            grid: what is asked for.
            out: directory of the runs and their prepared data.
            data_root: where the data sets with `files` lie; those that do not are left out.

        Raises:
            ConfigError: a configuration is wrong, or no data set of the grid is there.
        """
        self.grid = grid
        self._places = Places(grid, out, data_root)
        self.missing = self._places.missing
        """Data sets that are not there, and where they were looked for."""
        if len(self.missing) == len(grid.data_sets):
            places = ", ".join(map(str, self.missing.values()))
            raise ConfigError(
                f"no data set of the grid is there (looked at {places}); name their --data-root"
            )
        self._runs = {(run.data_set, run.method, run.option, run.seed): run for run in self._resolve()}
        self.sequences = sequence_runs(grid, self._places)
        """Those that follow a log, in order."""

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Data set and method of every cell of the tables."""
        names = [name for name in self.grid.data_sets if name not in self.missing]
        return [(name, method) for name in names for method in self.grid.methods_of(name)]

    @property
    def runs(self) -> Collection[Run]:
        """All of methods that may be asked for: every option with every seed."""
        return self._runs.values()

    @property
    def everything(self) -> Collection[AnyRun]:
        """All that may be asked for."""
        return [*self.runs, *self.sequences]

    @property
    def num_runs(self) -> int:
        """How many there are once every search is decided."""
        return self.num_left({})

    def num_left(self, done: Mapping[str, Record]) -> int:
        """How many are not done; of a pair whose search has not begun, as many as there will be."""
        left = {run.id for run in self.sequences}
        undecided = 0
        for pair in self.pairs:
            searched, chosen = self.search_runs(*pair), self.chosen_runs(*pair, done)
            left.update(run.id for run in (*searched, *chosen))
            undecided += 0 if chosen else self.grid.seeds_of(pair[1]) - bool(searched)
        return len(left - set(done)) + undecided

    def first_run(self, data_set: str) -> AnyRun:
        """Any run of a data set, to prepare its data by."""
        return next(run for run in self.everything if run.data_set == data_set)

    def search_runs(self, data_set: str, method: str) -> list[Run]:
        """One run an option, on the seed of the search; none of a method that does not search there."""
        if self.grid.searched(method) != method or not self.grid.runs_on(method, data_set):
            return []
        options = self.grid.data_sets[data_set].search
        return [self._runs[data_set, method, option, SEARCH_SEED] for option in options]

    def chosen_runs(self, data_set: str, method: str, done: Mapping[str, Record]) -> list[Run]:
        """The runs of all seeds with the option that is best on valid; empty if no option is done."""
        searched = self.search_runs(data_set, self.grid.searched(method))
        tried = [run for run in searched if run.id in done]
        if not tried:
            return []
        best = max(tried, key=lambda run: done[run.id].selection)
        seeds = range(self.grid.seeds_of(method))
        return [self._runs[data_set, method, best.option, seed] for seed in seeds]

    def next_run(
        self, done: Mapping[str, Record], failed: Collection[str], running: Collection[AnyRun]
    ) -> AnyRun | None:
        """The first run that can start now, seed after seed, so that a part of the grid is of use.

        Those that follow a log come behind all others that can start.

        Args:
            done: finished runs by id.
            failed: ids of runs not to be tried again.
            running: those under way. No two of one directory, so of one training, run at a time.

        Returns:
            None if there is none, for now or at all.
        """
        taken = {run.config.run_dir for run in running}
        for run in self._in_order(done, failed):
            if run.id not in done and run.id not in failed and run.config.run_dir not in taken:
                return run
        return None

    def _in_order(self, done: Mapping[str, Record], failed: Collection[str]) -> Iterator[AnyRun]:
        yield from self._wanted(done, failed)
        yield from self.sequences

    def _wanted(self, done: Mapping[str, Record], failed: Collection[str]) -> Iterator[Run]:
        for pair in self.pairs:
            yield from self.search_runs(*pair)
        pairs = [pair for pair in self.pairs if self._is_decided(pair, done, failed)]
        decided = [self.chosen_runs(*pair, done) for pair in pairs]
        # Whoever only scores comes behind those that train, whose own scores would have to be made anew.
        decided.sort(key=lambda runs: any(run.evaluate for run in runs))
        for seed in range(self.grid.seeds):
            for runs in decided:
                yield from runs[seed : seed + 1]

    def _is_decided(self, pair: tuple[str, str], done: Mapping[str, Record], failed: Collection[str]) -> bool:
        """Whether the search of a pair is over."""
        data_set, method = pair
        searched = self.search_runs(data_set, self.grid.searched(method))
        return all(run.id in done or run.id in failed for run in searched)

    def _resolve(self) -> Iterator[Run]:
        for data_set, method in self.pairs:
            for option in self.grid.data_sets[data_set].search:
                first = self._first_run(data_set, method, option)
                yield from (self._with_seed(first, seed) for seed in range(self.grid.seeds_of(method)))

    def _first_run(self, data_set: str, name: str, option: str) -> Run:
        """A run without seed and place, and so without an id."""
        where, method = self.grid.data_sets[data_set], self.grid.methods[self.grid.trained(name)]
        trains = as_arguments(
            {
                **self.grid.overrides,
                **where.overrides,
                **method.epochs(where.epochs),
                **method.overrides,
                **where.search[option],
                **self._places.data(data_set),
            },
            method.click_stage,
        )
        scores = as_arguments(self.grid.methods[name].evaluate, method.click_stage)
        try:
            config = load_config(where.config, trains)
            scoring_config = load_config(where.config, trains + scores) if scores else config
        except ConfigError as error:
            raise ConfigError(f"{data_set} / {name} / {option}: {error}") from error
        if "test" not in config.splits():
            raise ConfigError(f"{data_set}: its configuration {where.config} has no test rows")
        stages = tuple(method.stages)
        return Run(
            data_set,
            name,
            option,
            0,
            where.config,
            config,
            scoring_config,
            stages,
            tuple(trains),
            tuple(scores),
        )

    def _with_seed(self, first: Run, seed: int) -> Run:
        config, scoring = (one.model_copy(update={"seed": seed}) for one in (first.config, first.scoring))
        training_id = digest([first.data_set, first.stages, decisive(config, first.stages)])
        run_dir = self._places.run_dir(first.data_set, training_id)
        return replace(
            first,
            seed=seed,
            config=config.model_copy(update={"run_dir": run_dir}),
            scoring=scoring,
            overrides=(*first.overrides, f"seed={seed}", f"run_dir={run_dir}"),
            training_id=training_id,
            id=digest([training_id, decisive(scoring, first.stages)]),
        )
