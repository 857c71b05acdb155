"""Scores files of any size, a part at a time."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hetegen_rec.config.export import ScoringStrategy
from hetegen_rec.data.errors import DataError
from hetegen_rec.data.raw import iter_tables, list_row_groups
from hetegen_rec.scoring.scorer import Scorer

_SCHEMA = pa.schema([("row_id", pa.int64()), ("probability", pa.float32())])


def score_files(
    scorer: Scorer, inputs: Sequence[str], output: str | Path, strategy: ScoringStrategy = "plain"
) -> int:
    """Writes row id and click probability of every row, in the order of the files.

    Memory does not grow with the files: rows come and go in parts of bounded size. The output appears whole
    or not at all.

    Args:
        scorer: an artifact.
        inputs: Parquet or CSV files: paths, globs and URLs.
        output: a local Parquet file.
        strategy: one that the artifact has.

    Returns:
        The number of rows.

    Raises:
        ArtifactError: the artifact does not have the strategy.
        DataError: a file is damaged, lacks a column, or holds values of another type than in training; or the
            output is there already and holds no scores.
    """
    target = Path(output)
    if target.exists() and not _holds_scores(target):
        raise DataError(
            f"{output}: is there already, and not by `score`, so it is not replaced; the last path names the "
            "output, behind those to score: name a new file"
        )
    partial = target.with_name(f".{target.name}.partial")
    features, num_rows = scorer.artifact.manifest.features, 0
    try:
        with pq.ParquetWriter(partial, _SCHEMA, compression="zstd") as writer:
            for group in list_row_groups(inputs):
                for table in iter_tables(group, features, labelled=False):
                    scores = scorer.score(table, strategy)
                    ids = pa.array(range(num_rows, num_rows + len(scores)), pa.int64())
                    writer.write_table(pa.table([ids, pa.array(scores)], schema=_SCHEMA))
                    num_rows += len(scores)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return num_rows


def _holds_scores(path: Path) -> bool:
    """Whether scores may take its place."""
    try:
        return bool(pq.read_schema(path).equals(_SCHEMA))
    except (OSError, pa.ArrowException):
        return False
