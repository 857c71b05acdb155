"""How encoded rows lie in Parquet."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoded_shards import SCHEMA, encoded_rows

from hetegen_rec.data.encoded_rows import encoded_schema, open_encoded_file

ROWS = encoded_rows(0, 100)


@pytest.fixture
def path(tmp_path):
    with open_encoded_file(tmp_path / "rows.parquet", ROWS.schema) as writer:
        writer.write_table(ROWS)
    return tmp_path / "rows.parquet"


def test_a_file_gives_back_its_rows_in_their_own_types_without_a_look_into_a_dictionary(path):
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        assert file.read() == ROWS
        assert file.schema_arrow.remove_metadata() == encoded_schema(SCHEMA)
        group = file.metadata.row_group(0)
    columns = [group.column(place) for place in range(group.num_columns)]
    assert {encoding for column in columns for encoding in column.encodings} == {"RLE", "BYTE_STREAM_SPLIT"}


def test_damaged_bytes_of_a_page_are_noticed(path):
    with pq.ParquetFile(path) as file:
        start = file.metadata.row_group(0).column(0).data_page_offset
    content = np.fromfile(path, np.uint8)
    content[start + 60] ^= 1  # behind the header of the page
    content.tofile(path)
    with (
        pq.ParquetFile(path, page_checksum_verification=True) as file,
        pytest.raises((OSError, pa.ArrowInvalid)),
    ):
        file.read()
