"""A flipped bit anywhere in a parquet file: it is refused, or the rows and the record are the same."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spin.alignment.core.errors import InputError
from spin.alignment.core.parquet import ParquetSink, open_parquet, read_batches
from spin.alignment.core.provenance import Provenance
from tests.helpers import flipped

SCHEMA = pa.schema([("prompt_id", pa.string()), ("ids", pa.list_(pa.int64()))])
_CLOSING = 8  # bytes: the footer's length and "PAR1"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    with ParquetSink(path, SCHEMA, Provenance("generated", model="m", num_prompts=300)) as sink:
        sink.write([{"prompt_id": str(number), "ids": [number, number + 1]} for number in range(300)])
    return path


def test_other_readers_do_not_see_the_checksum(path: Path) -> None:
    table = pq.read_table(path)
    assert table.num_rows == 300 and table.schema.metadata == open_parquet(path).schema_arrow.metadata
    rewritten = path.with_name("rewritten.parquet")  # by a writer without checksums
    pq.write_table(table, rewritten)
    assert open_parquet(rewritten).metadata.num_rows == 300


def test_every_bit_of_the_footer_and_its_checksum_counts(path: Path, tmp_path: Path) -> None:
    whole, damaged = path.read_bytes(), tmp_path / "damaged.parquet"
    start = len(whole) - pq.ParquetFile(path).metadata.serialized_size - _CLOSING - 16
    for place in random.Random(0).sample(range(8 * start, 8 * len(whole)), 400):
        damaged.write_bytes(flipped(whole, place))
        with pytest.raises(InputError, match=r"damaged\.parquet is not a readable parquet file"):
            open_parquet(damaged)


def test_no_flipped_bit_changes_a_row_unnoticed(path: Path, tmp_path: Path) -> None:
    whole, damaged, expected = path.read_bytes(), tmp_path / "damaged.parquet", pq.read_table(path)
    noticed = 0
    for place in random.Random(0).sample(range(8 * len(whole)), 1500):
        damaged.write_bytes(flipped(whole, place))
        try:
            found = pa.Table.from_batches(list(read_batches(damaged)))
        except InputError as error:
            assert "damaged.parquet" in str(error)
            noticed += 1
        else:
            assert found.equals(expected, check_metadata=True), place
    assert noticed > 1400


def test_rows_that_a_damaged_page_header_hides_are_missed(path: Path, tmp_path: Path) -> None:
    """The header of a page is the one place without a checksum: the number of rows is compared with the footer's."""
    whole, damaged = path.read_bytes(), tmp_path / "damaged.parquet"
    headers = [pq.ParquetFile(path).metadata.row_group(0).column(number).data_page_offset for number in (0, 1)]
    said = []
    for place in (8 * header + bit for header in headers for bit in range(8 * 30)):
        damaged.write_bytes(flipped(whole, place))
        try:
            list(read_batches(damaged))
        except InputError as error:
            said.append(str(error))
    assert any("rows of 300" in sentence for sentence in said)
