"""Statistics of data that nobody has counted yet: what a schema says of the sizes of its tables."""

import math
from collections.abc import Mapping

import numpy as np

from hetegen_rec.config.errors import ConfigError
from hetegen_rec.config.schema import NUM_RESERVED_IDS, Field, Schema
from hetegen_rec.data.statistics import FieldStatistics, Statistics


def expected_statistics(schema: Schema, expected_values: Mapping[str, int]) -> Statistics:
    """What statistics would say of one row that fills every list, with values spread evenly.

    The counts take no memory, however large the tables.

    Args:
        schema: the fields; `hash` and `buckets` say themselves how large their tables are.
        expected_values: number of distinct values of the `vocab` fields, by name.

    Raises:
        ConfigError: fields whose number of values nothing says.
    """
    unknown = [owner.name for owner in schema.table_owners if _num_values(owner, expected_values) is None]
    if unknown:
        several = len(unknown) > 1
        raise ConfigError(
            f"how many values field{'s' * several} {', '.join(unknown)} will have is not known before "
            f"`hetegen prepare` has counted; set plan.expected_values.{unknown[0]}{' and so on' * several}, "
            "take `vocabulary: hash` with a `hash_size`, or prepare first"
        )
    return sized_statistics(
        schema, {owner.name: _num_values(owner, expected_values) or 0 for owner in schema.table_owners}
    )


def sized_statistics(schema: Schema, num_values: Mapping[str, int]) -> Statistics:
    """The same of tables whose numbers of distinct values are given, by the field that owns them."""
    fields = {field.name: _of_field(field, num_values[field.table_name]) for field in schema.fields}
    return Statistics(num_rows=1, num_positives=0, fields=fields)


def values_per_row(schema: Schema, statistics: Statistics) -> dict[str, float]:
    """Ids that an average row looks up, by field: of a list its filled positions, else 1.

    A list that is pooled and empty looks up the row of "missing"; an empty sequence looks up nothing.
    """
    found = {}
    for field in schema.fields:
        counted = statistics.fields[field.name]
        rows = max(statistics.num_rows, 1)
        if field.kind == "sequence":
            found[field.name] = counted.num_values / rows
        elif field.kind == "multi_valued":
            found[field.name] = (counted.num_values + counted.num_missing) / rows
        else:
            found[field.name] = 1.0
    return found


def _num_values(owner: Field, expected_values: Mapping[str, int]) -> int | None:
    return owner.hash_size or owner.num_buckets or expected_values.get(owner.name)


def _of_field(field: Field, num_values: int) -> FieldStatistics:
    num_ids = num_values + NUM_RESERVED_IDS
    return FieldStatistics(
        name=field.name,
        num_values=field.list_length,
        num_missing=0,
        num_out_of_vocabulary=0,
        cardinality=num_values,
        num_ids=num_ids,
        entropy=math.log(max(num_values, 1)),
        counts=np.broadcast_to(np.int64(1), (num_ids,)),
        table=field.table_name,
    )
