"""Where rows come from and how they are read: the section `data` of a run."""

import glob
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import NonNegativeInt, PositiveInt, model_validator

from hetegen_rec.config.errors import Section
from hetegen_rec.config.values import Texts

Split: TypeAlias = Literal["train", "valid", "test"]


class SourceConfig(Section):
    """A data set that the project can bring itself, written as raw Parquet under `data.raw_dir`."""

    name: Literal["movielens-100k", "synthetic"]
    """`movielens-100k` (taken from a pinned package at run time) or `synthetic`."""
    rows: PositiveInt = 100_000
    """`synthetic` only: rows over all splits."""
    id_cardinality: PositiveInt = 10_000
    """`synthetic` only: distinct values of each high-cardinality id."""
    seed: NonNegativeInt = 0
    """`synthetic` only: seed of the generating process."""

    @model_validator(mode="after")
    def _check(self) -> "SourceConfig":
        if self.name != "synthetic":
            self._refuse_unused(f"on source `{self.name}`", "rows", "id_cardinality", "seed")
        return self


class DataConfig(Section):
    """Where rows come from and how they are read."""

    source: SourceConfig | None = None
    """A built-in data set to bring first; none for your own data."""
    raw_dir: str | None = None
    """Where a built-in data set is written."""
    train: Texts = ()
    """Raw files of the training split: paths or globs of Parquet, CSV or TSV files (one format)."""
    valid: Texts = ()
    """Raw files of the validation split."""
    test: Texts = ()
    """Raw files of the test split; may be left out."""
    prepared_dir: str
    """Where `prepare` writes statistics, vocabularies and encoded shards."""
    keep_ids_of: str | None = None
    """The `prepared_dir` of older data whose ids these newer ones keep, so that training goes on from a
    checkpoint: values of exact vocabularies keep their ids, in use or not, and new ones are added behind;
    numeric fields keep the edges of their buckets. Counts are those of the newer data alone."""
    encode: Literal["prepared", "on_the_fly"] = "prepared"
    """Train from encoded shards, or encode raw shards while reading (no second copy of the data)."""
    rows_per_group: PositiveInt = 65_536
    """Rows of a row group in the encoded shards: the unit in which readers fetch."""
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """What becomes of rows that cannot be used, because their file is damaged or they are not what the
    schema says: `stop` with an error that names the place, or `skip`. Then `prepare` leaves out the whole
    row group (the whole file, where it is CSV or its footer is bad), and a reader passes over what broke
    later; both count and report it. Files given to `predict --input` always stop."""
    shuffle: bool = True
    """Shuffle the training rows anew in every epoch."""
    shuffle_rows: PositiveInt = 1_000_000
    """Rows held in memory per lane to shuffle among."""
    prefetch_batches: PositiveInt = 4
    """Batches made ahead by the reader's background thread."""
    lanes: PositiveInt | None = None
    """Equal shares into which an epoch is cut; each rank reads lanes / ranks of them. Runs with the
    same number of lanes train on the same rows in every step, whatever the number of ranks.
    Default: one a rank."""

    @model_validator(mode="before")
    @classmethod
    def _fill_source_paths(cls, values: object) -> object:
        if not isinstance(values, dict) or not values.get("source") or not values.get("raw_dir"):
            return values
        for split in ("train", "valid", "test"):
            values.setdefault(split, (f"{glob.escape(str(values['raw_dir']))}/{split}/*.parquet",))
        return values

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.source and not self.raw_dir:
            raise ValueError("`source` needs `raw_dir`: the directory to write the raw data to")
        if self.keep_ids_of is not None and Path(self.keep_ids_of) == Path(self.prepared_dir):
            raise ValueError(
                f"`keep_ids_of: {self.keep_ids_of}` is `prepared_dir` itself; give newer data a directory of "
                "their own"
            )
        for split in ("train", "valid"):
            if not getattr(self, split):
                raise ValueError(f"`{split}` is empty; name the raw files of that split")
        return self

    def raw_paths(self, split: Split) -> tuple[str, ...]:
        """Paths and globs of one split's raw files; empty if the split was left out."""
        paths: tuple[str, ...] = getattr(self, split)
        return paths
