"""What `data.on_bad_shard: skip` leaves out: told to the person, and kept in the manifest."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from hetegen_rec.config.data import Split

logger = logging.getLogger(__name__)

MOST_WARNINGS = 10
"""Bad shards of a preparation that are told of one by one."""


@dataclass(frozen=True)
class BadShard:
    """A row group, or a whole file, that cannot be used."""

    split: Split
    where: str
    """File, and row group if only that one is bad."""
    num_rows: int | None
    """Its rows; None if not even that can be read."""
    reason: str


def warn_of(shards: Sequence[BadShard], num_told: int) -> None:
    """Warns of bad shards, one line each; of the first ones only, of which `num_told` were told before."""
    left = max(MOST_WARNINGS - num_told, 0)
    for shard in shards[:left]:
        logger.warning("left out of `%s`: %s", shard.split, shard.reason)
    if len(shards) > left:
        logger.warning("and %d more bad shard(s); manifest.json will name them", len(shards) - left)


def summary(shards: Sequence[BadShard]) -> str:
    """How much was left out, in words."""
    num_rows = sum(shard.num_rows or 0 for shard in shards)
    unknown = sum(shard.num_rows is None for shard in shards)
    more = f" and {unknown} file(s) of unknown size" if unknown else ""
    return f"{len(shards)} bad shard(s) left out: {num_rows:,} row(s){more}"
