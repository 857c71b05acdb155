"""A click log of any size from a known process, with fields of very different difficulty.

Users and items belong to one of `NUM_CLUSTERS` clusters of taste and are drawn by Zipf's law
(P(rank k) ~ 1/k). One impression a second; each is

    click ~ Bernoulli(p),   p = sigmoid(-3.2 + 1.2 [item in the user's taste] + 2.2 [intent fits the item]
                                        + 0.6 user appetite + 0.8 appeal)

with standard normal appetite (of the user) and appeal (part of the item, part of the moment).

| field | kind | how it arises |
|---|---|---|
| `user_id`, `item_id` | id | Zipf; every other item is drawn from the user's taste |
| `category` | categorical | function of the item, 5 % replaced by noise |
| `department` | categorical | function of `category` (easy) |
| `segment` | categorical | the user's taste, 10 % replaced by noise |
| `city` | categorical | function of the user; no influence on clicks |
| `intent` | categorical | 40 % follow the user's taste, the rest is uniform (hard, but decides clicks) |
| `random_code` | categorical | uniform (noise) |
| `price` | numeric | log-normal, exp(2 + 0.6 appeal + 0.4 noise); 5 % missing |
| `random_number` | numeric | standard normal (noise) |
| `tags` | multi-valued | function of the item, 0 to 4 of them |
| `history` | sequence | items, 80 % from the user's taste, oldest first |

`true_probability` is p: the best score that any model can give. It is no feature.

What belongs to a user or an item is hashed from its id, and random numbers are seeded by chunk, so
memory depends neither on rows nor on ids, any rows can be made without those before them, and a
longer log begins with the shorter one.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hetegen_rec.data.sources.errors import SourceError
from hetegen_rec.data.sources.raw_shards import TRAIN_SHARDS, open_shard, shard_rows, split_rows

VERSION = 1
"""Raised when the process or its random numbers change."""

EASY_FIELDS = ("department",)
"""Determined by another field: a generative model soon has nothing left to learn here."""
HARD_FIELDS = ("intent",)
"""Only partly predictable, and decisive for clicks: the budget is well spent here."""
NOISE_FIELDS = ("random_code", "random_number")
"""Independent of everything: as hard as can be, and nothing to learn."""
TRUE_PROBABILITY = "true_probability"
"""Column with the probability by which the label was drawn; never a feature."""

CHUNK_ROWS = 16_384
"""Rows made at a time from one seed, and rows of a full row group."""
SHARD_ROWS = 64 * CHUNK_ROWS
"""Most rows of one file."""
MIN_ROWS = 10
"""Fewest rows of which every split gets one."""

NUM_CLUSTERS = 16
VALUES_PER_CLUSTER = 4
NUM_VALUES = NUM_CLUSTERS * VALUES_PER_CLUSTER  # categories, and intents
NUM_CITIES = 50
NUM_TAGS = 48
MAX_TAGS = 4
NUM_RANDOM_CODES = 24
MAX_HISTORY = 30
FIRST_SECOND = 1_767_225_600  # 2026-01-01 00:00:00 UTC

SCHEMA = pa.schema(
    [
        ("label", pa.int8()),
        ("timestamp", pa.int64()),
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("category", pa.int32()),
        ("department", pa.string()),
        ("segment", pa.string()),
        ("city", pa.string()),
        ("intent", pa.int32()),
        ("random_code", pa.int32()),
        ("price", pa.float32()),
        ("random_number", pa.float32()),
        ("tags", pa.list_(pa.string())),
        ("history", pa.list_(pa.int64())),
        (TRUE_PROBABILITY, pa.float64()),
    ]
)

Integers: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Process:
    """The generating process: equal processes make equal rows.

    Raises:
        SourceError: too few rows for three splits.
    """

    rows: int
    """Rows over all splits."""
    id_cardinality: int
    """Number of users, and of items."""
    seed: int

    def __post_init__(self) -> None:
        if self.rows < MIN_ROWS:
            raise SourceError(f"`data.source.rows: {self.rows}` leaves a split empty; use {MIN_ROWS} or more")

    def chunk(self, index: int) -> pa.Table:
        """The rows of one chunk: `CHUNK_ROWS` of them, or what is left at the end of the log."""
        # Drawn in full even at the end, so that a longer log begins with the shorter one.
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(index,)))
        first = index * CHUNK_ROWS
        return _draw_rows(self, rng, first).slice(0, max(0, self.rows - first))

    def read(self, rows: range) -> pa.Table:
        """Consecutive rows of one chunk."""
        index, start = divmod(rows.start, CHUNK_ROWS)
        return self.chunk(index).slice(start, len(rows))

    @property
    def num_clusters(self) -> int:
        """Clusters of taste: fewer than `NUM_CLUSTERS` where there are fewer items."""
        return min(NUM_CLUSTERS, self.id_cardinality)

    def uniform(self, trait: int, ids: Integers) -> Floats:
        """A uniform number in [0, 1) that belongs to each id, another one for each trait."""
        salt = np.random.SeedSequence([self.seed, trait]).generate_state(1, np.uint64)
        bits = _mix(ids.astype(np.uint64) ^ salt) >> np.uint64(11)
        return bits.astype(np.float64) * 2.0**-53

    def integer(self, trait: int, ids: Integers, stop: int) -> Integers:
        """A uniform integer in [0, stop) that belongs to each id."""
        return (self.uniform(trait, ids) * stop).astype(np.int64)

    def normal(self, trait: int, ids: Integers) -> Floats:
        """A standard normal number that belongs to each id (Box-Muller; takes two traits)."""
        radius = np.sqrt(-2.0 * np.log1p(-self.uniform(trait, ids)))
        normal: Floats = radius * np.cos(2.0 * np.pi * self.uniform(trait + 1, ids))
        return normal


class _Trait:
    """What is hashed from an id. Normal numbers take two places."""

    TASTE = 0
    ACTIVITY = 1
    CITY = 2
    APPETITE = 3
    CATEGORY = 5
    NUM_TAGS = 6
    FIRST_TAG = 7
    APPEAL = 8


def write(process: Process, directory: Path) -> None:
    """Writes the raw shards of all splits into `directory`, one chunk in memory at a time."""
    for split, rows in split_rows(process.rows).items():
        fewest = TRAIN_SHARDS if split == "train" else 1
        shards = shard_rows(rows, max(fewest, -(-len(rows) // SHARD_ROWS)))
        for index, shard in enumerate(shards):
            with open_shard(directory, split, index, SCHEMA) as writer:
                for piece in _chunk_pieces(shard):
                    writer.write_table(process.read(piece))


def _chunk_pieces(rows: range) -> list[range]:
    """Cuts rows where chunks end."""
    first_chunk, last_chunk = rows.start // CHUNK_ROWS, (rows.stop - 1) // CHUNK_ROWS
    inner = [chunk * CHUNK_ROWS for chunk in range(first_chunk + 1, last_chunk + 1)]
    ends = [rows.start, *inner, rows.stop]
    return [range(start, stop) for start, stop in pairwise(ends)]


def _draw_rows(process: Process, rng: np.random.Generator, first: int) -> pa.Table:
    """`CHUNK_ROWS` rows of the log, from row `first` on. The order of the draws is part of the process."""
    num = CHUNK_ROWS
    user = _zipf(rng, process.id_cardinality, num)
    taste = process.integer(_Trait.TASTE, user, process.num_clusters)
    item = _items(process, rng, taste, share_of_taste=0.5)
    cluster = item % process.num_clusters

    preferred = cluster * VALUES_PER_CLUSTER + process.integer(_Trait.CATEGORY, item, VALUES_PER_CLUSTER)
    category = _with_noise(rng, preferred, NUM_VALUES, noise=0.05)
    segment = _with_noise(rng, taste, NUM_CLUSTERS, noise=0.1)
    wish = taste * VALUES_PER_CLUSTER + rng.integers(VALUES_PER_CLUSTER, size=num)
    intent = _with_noise(rng, wish, NUM_VALUES, noise=0.6)

    appetite = process.normal(_Trait.APPETITE, user)
    appeal = 0.8 * process.normal(_Trait.APPEAL, item) + 0.6 * rng.standard_normal(num)
    fits = intent // VALUES_PER_CLUSTER == cluster
    logit = -3.2 + 1.2 * (cluster == taste) + 2.2 * fits + 0.6 * appetite + 0.8 * appeal
    probability = 1.0 / (1.0 + np.exp(-logit))

    price = np.exp(2.0 + 0.6 * appeal + 0.4 * rng.standard_normal(num))
    columns = {
        "label": rng.random(num) < probability,
        "timestamp": FIRST_SECOND + np.arange(first, first + num),
        "user_id": user,
        "item_id": item,
        "category": category,
        "department": _named("department", category // VALUES_PER_CLUSTER, NUM_CLUSTERS),
        "segment": _named("segment", segment, NUM_CLUSTERS),
        "city": _named("city", process.integer(_Trait.CITY, user, NUM_CITIES), NUM_CITIES),
        "intent": intent,
        "random_code": rng.integers(NUM_RANDOM_CODES, size=num),
        "price": pa.array(price, mask=rng.random(num) < 0.05),
        "random_number": rng.standard_normal(num),
        "tags": _tags(process, item, cluster),
        "history": _history(process, rng, user, taste),
        TRUE_PROBABILITY: probability,
    }
    return pa.table([pa.array(columns[field.name]).cast(field.type) for field in SCHEMA], schema=SCHEMA)


def _zipf(rng: np.random.Generator, cardinality: int, num: int) -> Integers:
    """Ranks from 0 with P(rank k) = log((k+2)/(k+1)) / log(cardinality+1), which is about 1/(k+1)."""
    positions = np.exp(rng.random(num) * np.log(cardinality + 1.0)).astype(np.int64)
    ranks: Integers = np.minimum(positions, cardinality) - 1
    return ranks


def _items(process: Process, rng: np.random.Generator, taste: Integers, share_of_taste: float) -> Integers:
    """Zipf items, some of them (by chance `share_of_taste`) moved to the neighbour in the taste's cluster."""
    item = _zipf(rng, process.id_cardinality, taste.size)
    # The cluster of an item is its id modulo the number of clusters.
    neighbour = item - item % process.num_clusters + taste
    neighbour -= np.where(neighbour >= process.id_cardinality, process.num_clusters, 0)
    return np.where(rng.random(taste.size) < share_of_taste, neighbour, item)


def _with_noise(rng: np.random.Generator, values: Integers, cardinality: int, noise: float) -> Integers:
    """Replaces values, by chance `noise`, by uniform ones."""
    uniform = rng.integers(cardinality, size=values.size)
    return np.where(rng.random(values.size) < noise, uniform, values)


def _named(name: str, values: Integers, cardinality: int) -> pa.Array:
    """Strings such as `city_07`."""
    return pa.array([f"{name}_{value:02d}" for value in range(cardinality)]).take(pa.array(values))


def _tags(process: Process, item: Integers, cluster: Integers) -> pa.ListArray:
    """0 to `MAX_TAGS` distinct tags of each item; items of a cluster share many."""
    first = 3 * cluster + process.integer(_Trait.FIRST_TAG, item, 8)
    tags = (first[:, None] + 5 * np.arange(MAX_TAGS)) % NUM_TAGS  # [B, MAX_TAGS]
    lengths = process.integer(_Trait.NUM_TAGS, item, MAX_TAGS + 1)
    kept = tags[np.arange(MAX_TAGS) < lengths[:, None]]
    return _lists(lengths, _named("tag", kept, NUM_TAGS))


def _history(process: Process, rng: np.random.Generator, user: Integers, taste: Integers) -> pa.ListArray:
    """0 to `MAX_HISTORY` items for each user, more for the active ones."""
    mean_length = 1.0 + 20.0 * process.uniform(_Trait.ACTIVITY, user)
    lengths = np.minimum(rng.geometric(1.0 / mean_length) - 1, MAX_HISTORY)
    return _lists(lengths, pa.array(_items(process, rng, np.repeat(taste, lengths), share_of_taste=0.8)))


def _lists(lengths: Integers, values: pa.Array) -> pa.ListArray:
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64: every bit of a value reaches every bit of the result."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed
