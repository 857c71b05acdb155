"""Staleness-aware sampling: earlier rows that are trained on again because they hold stale ids.

Found (FeSAIL, IJCAI 2023, arXiv 2505.02844, section on SAS): of a reservoir of earlier rows, at most L are
replayed; they are chosen to cover the greatest weight of ids that the new period lacks, where an id of
staleness s weighs 1 / s or exp(-s), plus a bias; maximum weighted coverage is NP-hard, and the greedy choice
has at least 1 - 1/e of the best weight.

Derived: the reservoir of a period is what the model before was trained on last, replayed rows included, so
nothing older has to be kept and an id may stay covered from period to period; the greedy choice is the lazy
one (Minoux 1978), which picks the same rows; where all stale ids are covered before L rows are chosen, the
other rows are taken one by one for the id that the choice holds the least often; of equal rows the later one
is taken.
"""

import heapq
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hetegen_rec.config.incremental import IncrementalConfig, StalenessWeight
from hetegen_rec.config.schema import Schema
from hetegen_rec.data.encoding import Encoder
from hetegen_rec.data.raw import RowGroup
from hetegen_rec.data.raw_parts import RawParts, raw_pattern
from hetegen_rec.data.row_pass import Progress, RowPass, silent
from hetegen_rec.data.staleness import Seen, Staleness, id_cells, nothing_seen
from hetegen_rec.data.statistics import Statistics
from hetegen_rec.data.workers import Workers, staged

logger = logging.getLogger(__name__)

_SUMMARY = "replay.json"
_STALENESS = "staleness"
_ROWS = "rows"
_OLDEST_EXPONENT = 700.0  # beyond that exp(-s) is no number above zero, which every stale id's worth must be


@dataclass(frozen=True)
class StaleRows:
    """Rows that hold stale ids, and which."""

    rows: NDArray[np.int64]
    """[R] index of each row among all candidates, ascending."""
    starts: NDArray[np.int64]
    """[R + 1] where the ids of each row begin."""
    ids: NDArray[np.int64]
    """[N] stale ids, numbered through over all tables; in a row each once, and at least one."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[R] stale ids of each row."""
        return np.diff(self.starts)

    def ids_of(self, place: int) -> NDArray[np.int64]:
        """The stale ids of one row."""
        return self.ids[self.starts[place] : self.starts[place + 1]]


@dataclass(frozen=True)
class ReplaySummary:
    """What was replayed."""

    candidates: int
    """Rows that could be."""
    with_stale_ids: int
    """Those of them that hold any stale id."""
    stale_ids: int
    """Distinct stale ids in them."""
    rows: int
    """Rows chosen."""
    covered_ids: int
    """Distinct stale ids in those."""


@dataclass(frozen=True)
class Replay:
    """The replayed rows of a period, as files."""

    directory: Path
    summary: ReplaySummary

    @property
    def files(self) -> list[str]:
        """Globs of the raw rows; none if there are none."""
        return [raw_pattern(self.directory / _ROWS)] if self.summary.rows else []

    @property
    def staleness_dir(self) -> Path:
        """Where the staleness of the ids in the new period lies."""
        return self.directory / _STALENESS


def read_replay(directory: Path) -> Replay | None:
    """What `ReplayWriter.write` left; None if it has not yet."""
    path = directory / _SUMMARY
    if not path.exists():
        return None
    return Replay(directory, ReplaySummary(**json.loads(path.read_text(encoding="utf-8"))))


class ReplayWriter:
    """Sees rows by the ids of the model that is to go on, chooses among them, and copies them.

    Rows are read in bounded memory. What is held is whether each id was seen, and the stale ids of the
    candidates: 8 bytes each on every rank while one rank chooses.
    """

    def __init__(
        self,
        schema: Schema,
        prepared_dir: str,
        rows_per_group: int,
        workers: Workers,
        progress: Progress = silent,
        *,
        skip_bad: bool = False,
    ) -> None:
        """Loads the ids.

        Args:
            schema: of the rows.
            prepared_dir: prepared data of the model that is to go on.
            rows_per_group: rows of a row group in what is written.
            workers: the processes that share the work; all must call everything here.
            progress: called on rank 0 as rows are done.
            skip_bad: leave out row groups that cannot be used, as `prepare` does under `on_bad_shard: skip`.
        """
        self._schema, self._workers = schema, workers
        self._rows_per_group = rows_per_group
        self._statistics = Statistics.load(prepared_dir)
        self._encoder = Encoder.load(prepared_dir, schema)
        self._pass = RowPass(schema, workers, progress, skip=skip_bad)

    def age(self, staleness: Staleness, new_rows: Sequence[RowGroup]) -> Staleness:
        """The staleness of every id after a period with these rows."""
        seen = nothing_seen(self._statistics)

        def look(table: pa.Table, first_row: int, where: str) -> None:
            for cells in id_cells(self._encoder.encode(table, first_row, where), self._schema):
                seen[cells.table][cells.ids] = True

        with self._workers.together("looking for the ids of a period"):
            self._pass.read(new_rows, "ids of the period", look)
        return staleness.after(_over_ranks(seen, self._workers))

    def write(
        self,
        directory: Path,
        staleness: Staleness,
        candidates: Sequence[RowGroup],
        config: IncrementalConfig,
    ) -> Replay:
        """Chooses rows and copies them into a directory, which appears whole or not at all.

        Args:
            directory: of the replayed rows, of how stale the ids are, and of a summary.
            staleness: of the ids in the new period.
            candidates: the earlier rows; other ranks' too.
            config: how many rows, and what an id is worth.
        """
        stale = self._find(staleness, candidates)
        chosen: NDArray[np.int64] = np.empty(0, np.int64)
        with self._workers.together("choosing the rows to replay"):
            if self._workers.rank == 0:
                worth = weights(_flat(staleness), config.weight, config.bias)
                chosen = choose_rows(stale, worth, config.replay_rows)
        chosen = self._workers.broadcast(chosen)
        summary = _summarise(stale, chosen, sum(group.num_rows for group in candidates))
        with staged(directory, self._workers) as partial:
            self._copy(partial / _ROWS, candidates, np.sort(stale.rows[chosen]))
            with self._workers.together("writing what was replayed"):
                if self._workers.rank == 0:
                    staleness.save(partial / _STALENESS)
                    (partial / _SUMMARY).write_text(json.dumps(asdict(summary)), encoding="utf-8")
        return Replay(directory, summary)

    def _find(self, staleness: Staleness, candidates: Sequence[RowGroup]) -> StaleRows:
        """The candidates with stale ids, over all ranks."""
        flat, starts = _flat(staleness), _starts(staleness)
        cells_of_rank: list[NDArray[np.int64]] = []  # row and id in one number

        def look(table: pa.Table, first_row: int, where: str) -> None:
            for cells in id_cells(self._encoder.encode(table, first_row, where), self._schema):
                ids = cells.ids.astype(np.int64) + starts[cells.table]
                is_stale = flat[ids] > 0
                cells_of_rank.append((cells.rows[is_stale] + first_row) * len(flat) + ids[is_stale])

        with self._workers.together("looking for stale ids"):
            self._pass.read(candidates, "stale ids of earlier rows", look)
        mine = np.unique(np.concatenate([np.empty(0, np.int64), *cells_of_rank]))
        found = np.sort(np.concatenate(self._workers.gather(mine)))  # a row is of one rank
        rows, firsts = np.unique(found // len(flat), return_index=True)
        return StaleRows(rows, np.append(firsts, len(found)), found % len(flat))

    def _copy(self, directory: Path, candidates: Sequence[RowGroup], rows: NDArray[np.int64]) -> None:
        parts = RawParts(directory, self._workers.rank, self._rows_per_group)

        def copy(table: pa.Table, first_row: int, where: str) -> None:  # noqa: ARG001
            first, last = np.searchsorted(rows, [first_row, first_row + len(table)])
            parts.add(table.take(pa.array(rows[first:last] - first_row)))

        with self._workers.together("copying the rows to replay"):
            self._pass.read(candidates, "replay", copy)
            parts.close()


def weights(staleness: NDArray[np.uint16], weight: StalenessWeight, bias: float) -> NDArray[np.float64]:
    """What covering each id is worth (equation 2): nothing where it is not stale."""
    ages = np.maximum(staleness, 1).astype(np.float64)
    worth = 1.0 / ages if weight == "inverse" else np.exp(-np.minimum(ages, _OLDEST_EXPONENT))
    return np.where(staleness > 0, worth + bias, 0.0)


def choose_rows(stale: StaleRows, worth: NDArray[np.float64], num_rows: int) -> NDArray[np.int64]:
    """Greedy maximum weighted coverage, then equal shares.

    Args:
        stale: the rows to choose from.
        worth: by id.
        num_rows: most rows to choose.

    Returns:
        Places in `stale.rows`, in the order in which they were chosen.
    """
    if len(stale.rows) <= num_rows:
        return np.arange(len(stale.rows))
    chosen = _cover(stale, worth, num_rows)
    return np.array(chosen + _fill(stale, worth, chosen, num_rows - len(chosen)), np.int64)


def _cover(stale: StaleRows, worth: NDArray[np.float64], num_rows: int) -> list[int]:
    """Places that cover one after the other the most of what is not covered yet, until all is."""
    uncovered = worth.copy()
    # Gains only fall, so a row whose gain, counted anew, is still the greatest is the one.
    heap = [(-gain, -place) for place, gain in enumerate(_weights_of(stale, worth).tolist())]
    heapq.heapify(heap)
    cover: list[int] = []
    while heap and len(cover) < num_rows:
        ids = stale.ids_of(-heap[0][1])
        now = (-float(uncovered[ids].sum()), heap[0][1])
        if not now[0]:
            heapq.heappop(heap)
        elif now[0] > heap[0][0]:
            heapq.heapreplace(heap, now)
        else:
            heapq.heappop(heap)
            cover.append(-now[1])
            uncovered[ids] = 0.0
    return cover


def _fill(stale: StaleRows, worth: NDArray[np.float64], chosen: list[int], num_rows: int) -> list[int]:
    """More places: each holds the id that the choice holds the least often, and the most weight beside."""
    is_chosen = np.zeros(len(stale.rows), bool)
    is_chosen[chosen] = True
    held = np.bincount(stale.ids[np.repeat(is_chosen, stale.lengths)], minlength=len(worth))
    queues = _rows_by_id(stale, worth)
    heap = [(int(held[one]), -float(worth[one]), one) for one in queues]
    heapq.heapify(heap)
    more: list[int] = []
    while heap and len(more) < num_rows:
        times, weight, one = heap[0]
        queue = queues[one]
        while queue and is_chosen[queue[-1]]:
            queue.pop()
        if not queue:
            heapq.heappop(heap)
        elif times < held[one]:  # other ids' rows hold it too
            heapq.heapreplace(heap, (int(held[one]), weight, one))
        else:
            more.append(queue.pop())
            is_chosen[more[-1]] = True
            held[stale.ids_of(more[-1])] += 1
    return more


def _rows_by_id(stale: StaleRows, worth: NDArray[np.float64]) -> dict[int, list[int]]:
    """By id, the places of the rows that hold it; those of the most weight, and of them the later, last."""
    places = np.repeat(np.arange(len(stale.rows)), stale.lengths)
    order = np.lexsort((places, _weights_of(stale, worth)[places], stale.ids))
    ids, firsts = np.unique(stale.ids[order], return_index=True)
    parts = np.split(places[order], firsts[1:])
    return {one: part.tolist() for one, part in zip(ids.tolist(), parts, strict=True)}


def _weights_of(stale: StaleRows, worth: NDArray[np.float64]) -> NDArray[np.float64]:
    """[R] the weight of all stale ids of each row."""
    weights: NDArray[np.float64] = np.add.reduceat(worth[stale.ids], stale.starts[:-1])
    return weights


def _flat(staleness: Staleness) -> NDArray[np.uint16]:
    """The staleness of all ids, table after table."""
    return np.concatenate(list(staleness.by_table.values()))


def _starts(staleness: Staleness) -> dict[str, int]:
    """Where the ids of each table begin in `_flat`."""
    sizes = [len(ages) for ages in staleness.by_table.values()]
    return dict(zip(staleness.by_table, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))


def _over_ranks(seen: Seen, workers: Workers) -> Seen:
    """What any rank has seen. A collective."""
    packed = workers.gather({table: np.packbits(here) for table, here in seen.items()})
    merged = {table: np.bitwise_or.reduce([part[table] for part in packed]) for table in seen}
    return {table: np.unpackbits(merged[table], count=len(here)).astype(bool) for table, here in seen.items()}


def _summarise(stale: StaleRows, chosen: NDArray[np.int64], candidates: int) -> ReplaySummary:
    covered = [stale.ids_of(place) for place in chosen]
    return ReplaySummary(
        candidates=candidates,
        with_stale_ids=len(stale.rows),
        stale_ids=len(np.unique(stale.ids)),
        rows=len(chosen),
        covered_ids=len(np.unique(np.concatenate([np.empty(0, np.int64), *covered]))),
    )
