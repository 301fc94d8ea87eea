"""Raw files behind a URI: Parquet, CSV or JSONL, checked before anything expensive starts."""

from __future__ import annotations

import io
from collections.abc import Collection
from typing import TYPE_CHECKING

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from infra.errors import DataError

if TYPE_CHECKING:
    import ray.data

FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}

BLOCK_BYTES = 16 << 20


def data_files(uri: str) -> tuple[str, list[str]]:
    """Format and full paths of the data files at a URI.

    Raises:
        DataError: nothing there, an unknown ending, or several formats in one folder.
    """
    if not uri:
        raise DataError("no logs were given", where="data.logs", mend="pass --logs FILE_OR_FOLDER")
    fs, path = storage.filesystem(uri)
    with storage.storage_errors(uri):
        if not fs.exists(path):
            raise DataError("the path does not exist", where=uri, mend="check --logs and --items")
        found = sorted(fs.find(path)) if fs.isdir(path) else [path]
    by_format: dict[str, list[str]] = {}
    for name in found:
        for ending, kind in FORMATS.items():
            if name.endswith(ending):
                by_format.setdefault(kind, []).append(name)
    if len(by_format) != 1:
        problem = f"several formats: {', '.join(sorted(by_format))}" if by_format else "no Parquet, CSV or JSONL file"
        raise DataError(problem, where=uri, mend=f"name one file, or a folder with one of {', '.join(FORMATS)}")
    return next(iter(by_format.items()))


def column_names(uri: str) -> list[str]:
    """Columns of the data files at a URI; every Parquet footer is read, so that a truncated file is found now.

    Raises:
        DataError: a file that cannot be read, by name.
    """
    kind, files = data_files(uri)
    fs, _ = storage.filesystem(uri)
    names: list[str] = []
    for name in files:
        try:
            if kind == "parquet":
                with fs.open(name, "rb") as stream:
                    columns = pq.read_schema(stream).names
            elif not names:  # text files: the first one tells
                columns = _read_text(_first_lines(fs.open(name, "rb")), kind).columns
        except (pa.ArrowException, pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"the file cannot be read (truncated or not {kind}?): {str(error).splitlines()[0]}",
                where=name,
                mend="write the file again, or take it out of the folder",
            ) from error
        names = names or list(columns)
    return names


def require_columns(wanted: dict[str, str], present: Collection[str], *, uri: str) -> None:
    """Refuse a table that lacks a column.

    Args:
        wanted: setting -> column name.
        present: the table's columns.
        uri: named in the error.

    Raises:
        DataError: naming the columns that are missing, those that are there, and the setting that maps them.
    """
    missing = {setting: column for setting, column in wanted.items() if column not in present}
    if missing:
        raise DataError(
            f"missing column{'s' if len(missing) > 1 else ''}: {', '.join(repr(c) for c in missing.values())}",
            where=f"{uri} has {', '.join(present)}",
            mend=", ".join(f"--set data.columns.{setting}=YOUR_COLUMN" for setting in missing),
        )


def read_frame(uri: str) -> pl.DataFrame:
    """All data files at a URI as one frame, for tables that fit in memory (the catalogue)."""
    kind, files = data_files(uri)
    fs, _ = storage.filesystem(uri)
    frames = []
    for name in files:
        try:
            content = fs.cat_file(name)
            frames.append(pl.read_parquet(io.BytesIO(content)) if kind == "parquet" else _read_text(content, kind))
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(f"the file cannot be read: {str(error).splitlines()[0]}", where=name, mend="write it again") from error
    return pl.concat(frames, how="diagonal_relaxed")


def read_dataset(uri: str, columns: list[str]) -> ray.data.Dataset:
    """The data files at a URI as a Ray dataset of some columns."""
    import ray.data

    kind, files = data_files(uri)
    fs, _ = storage.filesystem(uri)
    filesystem = None if storage.is_local(uri) else fs
    # Ray would cut small files into hundreds of blocks, each of them a task.
    blocks = max(len(files), sum(fs.size(name) for name in files) // BLOCK_BYTES, 1)
    if kind == "parquet":
        return ray.data.read_parquet(files, columns=columns, filesystem=filesystem, override_num_blocks=blocks)
    reader = ray.data.read_csv if kind == "csv" else ray.data.read_json
    return reader(files, filesystem=filesystem, file_extensions=None, override_num_blocks=blocks).select_columns(columns)


def _read_text(content: bytes, kind: str) -> pl.DataFrame:
    if kind == "csv":
        return pl.read_csv(io.BytesIO(content), infer_schema_length=10_000)
    return pl.read_ndjson(io.BytesIO(content), infer_schema_length=10_000)


def _first_lines(stream: io.BufferedIOBase, count: int = 100) -> bytes:
    with stream:
        return b"".join(line for _, line in zip(range(count), stream, strict=False))
