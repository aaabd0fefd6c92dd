"""Reads parquet files of unknown origin within bounds, row by row; converts columns of arrays as LeRobot stores them.

Knows pyarrow. Knows no layout of a dataset.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_policy.basics.files import refuse_irregular
from diffusion_policy.datasets.formats.reading import library, most_bytes, say_too_large
from diffusion_policy.datasets.storage import StoreError

ROWS_AT_A_TIME = 1024


def arrow_libraries() -> tuple[Any, Any]:
    """pyarrow and its part for parquet; raises StoreError where they are absent."""
    return library("pyarrow", "LeRobot datasets"), library("pyarrow.parquet", "LeRobot datasets")


@contextlib.contextmanager
def opened(path: Path, columns: Sequence[str] = ()) -> Iterator[Any]:
    """A parquet file; raises StoreError where a group of rows of these columns would unpack into too much."""
    _, parquet = arrow_libraries()
    refuse_irregular(path)
    most = most_bytes(path)
    with parquet.ParquetFile(path, thrift_string_size_limit=2**26, thrift_container_size_limit=2**20) as file:
        for i in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(i)
            for part in map(group.column, range(group.num_columns)):
                size = max(part.total_uncompressed_size, 8 * part.num_values)
                if size > most and part.path_in_schema.startswith(tuple(columns)):
                    name = f"{path.parent.name}/{path.name}: {part.path_in_schema}"
                    raise StoreError(f"{name} is too large in its group of rows {i}: {say_too_large(size, path)}")
        yield file


class TableReader:
    """Reads the rows of all data files from first to last."""

    def __init__(self, files: list[Path], names: list[str], rows_at_a_time: int) -> None:
        self._arrow, _ = arrow_libraries()
        self._names = names
        self._rows_at_a_time = min(ROWS_AT_A_TIME, rows_at_a_time)
        self._batches = self._read(files)
        self._rest: Any = None

    def _read(self, files: list[Path]) -> Iterator[Any]:
        for path in files:
            with opened(path, self._names) as file:
                lacking = {*self._names} - {*file.schema_arrow.names}
                if lacking:
                    raise StoreError(f"{path.parent.name}/{path.name} has no column {', '.join(sorted(lacking))}")
                for batch in file.iter_batches(self._rows_at_a_time, columns=self._names):
                    yield self._arrow.Table.from_batches([batch]).select(self._names)

    def read(self, count: int) -> Any:
        """The next rows, as a table."""
        parts = [] if self._rest is None else [self._rest]
        held = sum(map(len, parts))
        while held < count:
            part = next(self._batches, None)
            if part is None:
                raise StoreError(f"data/ ends within an episode: {count} rows are needed, {held} left")
            parts.append(part)
            held += len(part)
        table = self._arrow.concat_tables(parts)
        self._rest = table.slice(count)
        return table.slice(0, count)


def to_numpy(column: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A column as an array (rows, *shape); (rows,) for the shape (1,). Raises StoreError for gaps."""
    pyarrow, _ = arrow_libraries()
    array = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    array = pyarrow.concat_arrays(array.chunks) if hasattr(array, "chunks") else array
    array = array.storage if isinstance(array, pyarrow.ExtensionArray) else array  # Array2D of Hugging Face datasets
    rows = len(array)
    for size in () if shape == (1,) and not _is_list(array) else shape:
        if array.null_count or not _is_list(array) or not _all_have_length(array, size):
            raise StoreError(f"a column of {column.type} has rows that are not of shape {shape}")
        array = array.flatten()
    if array.null_count or _is_list(array):
        raise StoreError(f"a column of {column.type} has gaps, or rows that are not of shape {shape}")
    return array.to_numpy(zero_copy_only=False).reshape(rows, *(() if shape == (1,) else shape))


def _all_have_length(array: Any, size: int) -> bool:
    if arrow_libraries()[0].types.is_fixed_size_list(array.type):
        return array.type.list_size == size
    return bool((array.value_lengths().to_numpy() == size).all())


def _is_list(array: Any) -> bool:
    pyarrow, _ = arrow_libraries()
    kinds = pyarrow.types
    return kinds.is_list(array.type) or kinds.is_large_list(array.type) or kinds.is_fixed_size_list(array.type)


def to_arrow(rows: np.ndarray) -> Any:
    """Rows (rows, ...) as LeRobot keeps them: numbers, lists of fixed size, or lists of lists."""
    pyarrow, _ = arrow_libraries()
    shape = rows.shape[1:]
    array = pyarrow.array(np.ascontiguousarray(rows).reshape(-1))
    if shape in ((), (1,)):
        return array
    if len(shape) == 1:
        return pyarrow.FixedSizeListArray.from_arrays(array, shape[0])
    for size in reversed(shape):
        array = pyarrow.ListArray.from_arrays(np.arange(0, len(array) + 1, size, dtype=np.int32), array)
    return array
