"""Rows of no log: random ids in every place, encoded as prepared rows are."""

import numpy as np
import pyarrow as pa

from hetegen_rec.config.schema import NUM_RESERVED_IDS, Schema
from hetegen_rec.data.encoded_rows import LABEL, ROW_ID, encoded_schema
from hetegen_rec.data.statistics import Statistics


def random_rows(
    schema: Schema, statistics: Statistics, num_rows: int, first_row: int, rng: np.random.Generator
) -> pa.Table:
    """Rows with a value in every place; lists are as long as they may be.

    Args:
        schema: the fields.
        statistics: sizes of the tables.
        num_rows: how many.
        first_row: index of the first one.
        rng: draws ids, none of the reserved ones where a table has others, and labels.
    """
    columns = {
        LABEL: pa.array(rng.integers(0, 2, num_rows).astype(np.float32)),
        ROW_ID: pa.array(np.arange(first_row, first_row + num_rows)),
    }
    for field in schema.fields:
        num_ids = statistics.table_rows(field.table_name)
        least = min(NUM_RESERVED_IDS, num_ids - 1)
        ids = rng.integers(least, num_ids, (num_rows, field.list_length), dtype=np.int32)
        columns[field.name] = pa.array(list(ids)) if field.is_list else pa.array(ids[:, 0])
    context = pa.array(np.arange(num_rows))
    target = encoded_schema(schema)
    return pa.table([columns.get(name, context) for name in target.names], names=target.names).cast(target)
