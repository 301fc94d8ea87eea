"""Catalogues and matrices that are larger than memory: read by blocks of rows, kept in files.

Shapes: N items, D width of a matrix.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from components.semantic_ids.shards import ROWS, Ints, Matrix
from infra import storage
from infra.errors import DataError

NewMatrix = Callable[[int, int], Matrix]  # rows, width


@dataclass(frozen=True)
class Catalogue:
    """A file of CATALOGUE rows on this machine, of which only a block is in memory."""

    path: Path

    def __len__(self) -> int:
        return storage.count_rows(self.path)

    def blocks(self, *columns: str) -> Iterator[pa.RecordBatch]:
        """Some columns of all rows, `ROWS` rows at a time."""
        return storage.read_batches(self.path, columns, rows=ROWS)

    def table(self, *columns: str) -> pa.Table:
        """Whole columns, of which an item has but a few bytes."""
        return pa.Table.from_batches(list(self.blocks(*columns)))

    def at(self, column: str, rows_n: Ints) -> list[Any]:
        """A column's values of a few rows, in their order."""
        wanted, found, start = np.unique(rows_n), dict[int, Any](), 0
        for block in self.blocks(column) if len(wanted) else ():
            here = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, start + len(block))]
            found |= zip(here.tolist(), block[column].take(pa.array(here - start)).to_pylist(), strict=True)
            start += len(block)
        return [found[row] for row in rows_n.tolist()]

    def groups(self, column: str) -> pa.DictionaryArray:
        """A column of which many items share a value: the values, and the number of each item's."""
        coded = pa.chunked_array([block[column].dictionary_encode() for block in self.blocks(column)])
        return coded.unify_dictionaries().combine_chunks()


@contextmanager
def open_catalogue(uri: str) -> Iterator[Catalogue]:
    """The catalogue behind a URI; from afar it is fetched into a temporary file first.

    Raises:
        DataError: it has no items.
        IntegrityError: it is no Parquet file.
    """
    with storage.local_copy(uri) as path:
        catalogue = Catalogue(path)
        if not len(catalogue):
            raise DataError("the catalogue has no items", where=uri, mend="look at the logs and the item file")
        yield catalogue


@contextmanager
def scratch(uri: str) -> Iterator[NewMatrix]:
    """Matrices in files instead of memory: the system writes out and drops what is not in use, and reads it again.

    Args:
        uri: the files lie below this folder, or among the temporary files where it is not of this machine. They go when the context
            ends, however it ends.

    Returns:
        a function of rows and width that makes a matrix of zeros, float32.

    Raises:
        StorageError: by that function, where the disk has too little room.
    """
    local = storage.filesystem(uri)[1] if storage.is_local(uri) else None
    if local:
        os.makedirs(local, exist_ok=True)
    folder, numbers = Path(tempfile.mkdtemp(prefix="scratch-", dir=local)), itertools.count()

    def new(rows: int, width: int) -> Matrix:
        if not rows * width:
            return np.empty((rows, width), np.float32)
        path = folder / f"{next(numbers)}.f32"
        with storage.storage_errors(str(folder)), path.open("xb") as file:
            # Where the disk is full this is an error; a hole in the file would end the process once it is written to.
            os.posix_fallocate(file.fileno(), 0, 4 * rows * width)
        return np.memmap(path, np.float32, "r+", shape=(rows, width)).view(np.ndarray)

    try:
        yield new
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def filled(new: NewMatrix, rows: int, blocks: Iterable[Matrix]) -> Matrix:
    """A new matrix of so many rows, made of blocks below each other."""
    matrix, start = new(0, 0), 0
    for block in blocks:
        if not start:
            matrix = new(rows, block.shape[1])
        matrix[start : start + len(block)] = block
        start += len(block)
    return matrix


def cut(rows: int) -> Iterator[slice]:
    """Blocks of `ROWS` rows."""
    return (slice(start, start + ROWS) for start in range(0, rows, ROWS))
