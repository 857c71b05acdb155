"""Parts of a split that are reported on their own: cold-start users and long-tail items.

Both are defined by how many training rows the row's user and item have (docs/method.md section 8).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hetegen_rec.config.run import EvaluationConfig
from hetegen_rec.data.batching import NO_ITEM
from hetegen_rec.evaluation.counts import IntArray

MISSING_USER = 0
"""`user_key` of rows whose user is not given; they are nobody's, so neither new nor known."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Slice:
    """Some rows of a split."""

    name: str
    """Key in evaluation.json."""
    title: str
    """Heading in tables and plots."""
    mask: Mask
    """[N] the rows that belong to it."""


def make_slices(
    context: Mapping[str, IntArray], config: EvaluationConfig, head_items_threshold: int | None
) -> list[Slice]:
    """The slices that the context columns allow, in order of report.

    Args:
        context: [N] columns; `user_rows` and `item_rows` (training rows of the row's user and item)
            are looked at, and `user_key`. A row whose user or item is not given is in none of its slices.
        config: bounds of the slices.
        head_items_threshold: training rows of the least frequent item of the head, from
            `head_threshold`; None leaves out head and tail.
    """
    return [*_user_slices(context, config), *_item_slices(context, head_items_threshold)]


def head_threshold(counts: npt.NDArray[np.integer], share: float) -> int:
    """The smallest count inside the head: the fewest items that cover `share` of all training rows.

    Items with at least that many training rows are the head, all others the long tail.

    Args:
        counts: [items] training rows of each item.
        share: between 0 and 1.
    """
    descending = np.sort(counts[counts > 0].astype(np.int64))[::-1]
    if not len(descending):
        return 1
    if share <= 0.0:
        return int(descending[0]) + 1
    covered = np.cumsum(descending)
    # A share such as 0.7 of 10 rows must not become 7.000000000000001.
    needed = share * covered[-1] * (1.0 - 1e-12)
    return int(descending[np.searchsorted(covered, needed)])


def _user_slices(context: Mapping[str, IntArray], config: EvaluationConfig) -> list[Slice]:
    if "user_rows" not in context:
        return []
    seen, most = context["user_rows"], config.cold_user_rows
    known = context["user_key"] != MISSING_USER if "user_key" in context else np.ones(len(seen), np.bool_)
    cold_rows = "1 training row" if most == 1 else f"1-{most} training rows"
    return [
        Slice("new_users", "users without a training row", known & (seen == 0)),
        Slice("cold_users", f"users with {cold_rows}", known & (seen >= 1) & (seen <= most)),
        Slice("warm_users", f"users with more than {most}", known & (seen > most)),
    ]


def _item_slices(context: Mapping[str, IntArray], threshold: int | None) -> list[Slice]:
    if "item_rows" not in context:
        return []
    seen = context["item_rows"]
    known = seen != NO_ITEM
    unseen = Slice("unseen_items", "items without a training row", seen == 0)
    if threshold is None:
        return [unseen]
    return [
        unseen,
        Slice("tail_items", f"long-tail items (under {threshold:,} rows)", known & (seen < threshold)),
        Slice("head_items", f"head items ({threshold:,} rows or more)", known & (seen >= threshold)),
    ]
