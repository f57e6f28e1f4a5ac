"""Small parquet tables from outside: sizes capped, columns and types checked, nothing null."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from omni_cli.errors import DataError
from omni_cli.scene.clock import Float64Array, Int64Array

MAX_BYTES = 1 << 30
_MAX_RATIO = 1000


def read_table(source: Path | bytes, name: str, columns: Iterable[str]) -> pa.Table:
    """Read columns of a parquet file, an index of pandas included.

    Args:
        source: a file, or the content of one.
        name: what to call it in an error.
        columns: the columns that must be there; all others are left unread.

    Raises:
        DataError: it is no parquet file, a column is missing or nested, a text is not UTF-8, or it would unpack to more
            than `MAX_BYTES`.
    """
    try:
        with pq.ParquetFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            packed = len(source) if isinstance(source, bytes) else source.stat().st_size
            groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
            unpacked = sum(group.total_byte_size for group in groups)
            if unpacked > MAX_BYTES or unpacked > packed * _MAX_RATIO:
                raise DataError(f"{name}: {packed} bytes unpack to {unpacked}; refused, fetch it again")
            wanted, there = list(columns), file.schema_arrow.names
            if missing := [column for column in wanted if column not in there]:
                raise DataError(f"{name}: has no column {missing[0]!r}, it has {', '.join(there)}; fetch it again")
            table = file.read(columns=wanted)
            table.validate(full=True)  # a text that is not UTF-8
    except FileNotFoundError:
        raise DataError(f"{name}: no such file; fetch it with omni fetch") from None
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise DataError(f"{name}: not a readable parquet file ({first_line}); fetch it again") from None
    if nested := [field.name for field in table.schema if pa.types.is_nested(field.type)]:
        raise DataError(f"{name}: column {nested[0]!r} holds lists or structures; fetch it again")
    return table


def timestamps(table: pa.Table, column: str, name: str) -> Int64Array:
    """Return a column of strictly increasing int64 microseconds.

    Raises:
        DataError: it is empty, of another type, holds nulls, or does not increase; the message gives the row.
    """
    values = table.column(column)
    if values.type != pa.int64() or values.null_count or not len(values):
        raise DataError(f"{name}: {column} is {len(values)} x {values.type} with {values.null_count} nulls; expected "
                        "int64 microseconds; fetch it again or quarantine the clip")  # fmt: skip
    times = values.to_numpy()
    if (rows := np.flatnonzero(np.diff(times) <= 0)).size:
        row = int(rows[0]) + 1
        raise DataError(f"{name}: {column} does not increase at row {row} ({times[row - 1]} then {times[row]} us); "
                        "quarantine the clip")  # fmt: skip
    return np.asarray(times, np.int64)


def numbers(table: pa.Table, columns: Iterable[str], name: str) -> Float64Array:
    """Return columns as (rows, columns) float64.

    Raises:
        DataError: a value is NaN, infinite or null, or a column is not numeric; the message gives the first.
    """
    wanted = list(columns)
    try:
        values = np.stack([table.column(column).cast(pa.float64()).to_numpy() for column in wanted], axis=1)
    except pa.ArrowException as error:
        raise DataError(f"{name}: a column is not numeric ({error}); fetch it again") from None
    if (bad := np.argwhere(~np.isfinite(values))).size:
        row, column = bad[0]
        raise DataError(f"{name}: {wanted[column]} is {values[row, column]} at row {row}; expected finite numbers; "
                        "quarantine the clip")  # fmt: skip
    return values
