"""Raw files behind a URI: Parquet, CSV or JSONL, checked before anything expensive starts."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from infra import storage
from infra.errors import DataError, RankGRError, StorageError

FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}

MALFORMED = "malformed_line"
"""Column of a line that could not be parsed; null beside good rows."""

BLOCK_BYTES = 16 << 20
_ROWS = 200_000


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


def columns_by_file(uri: str) -> tuple[dict[str, list[str]], list[RankGRError]]:
    """Columns of each data file at a URI, and an error for each that cannot be read.

    Every Parquet footer is read, so that a truncated file is found now.

    Raises:
        DataError: there are no data files.
    """
    kind, files = data_files(uri)
    fs, _ = storage.filesystem(uri)
    found: dict[str, list[str]] = {}
    unreadable: list[RankGRError] = []
    for name in files:
        try:
            with unreadable_files(name, kind), fs.open(name, "rb") as stream:
                if kind == "parquet":
                    found[name] = list(pq.read_schema(stream).names)
                elif kind == "csv":
                    found[name] = _read_csv(b"".join(islice(stream, 1))).columns
                else:
                    found[name] = _keys_of_first_objects(stream)
        except RankGRError as error:
            unreadable.append(error)
    if kind == "jsonl":  # a key that an object leaves out is a null
        every = list(dict.fromkeys(key for keys in found.values() for key in keys))
        found = dict.fromkeys(found, every)
    return found, unreadable


def column_names(uri: str) -> list[str]:
    """Columns that at least one data file at a URI has."""
    return list(dict.fromkeys(name for names in columns_by_file(uri)[0].values() for name in names))


def problems_of(uri: str, wanted: dict[str, str]) -> list[RankGRError]:
    """What keeps the files at a URI from being read: none there, unreadable ones, missing columns.

    Args:
        uri: of the files.
        wanted: setting -> column name.
    """
    try:
        present, found = columns_by_file(uri)
    except RankGRError as error:
        return [error]
    for name, columns in present.items():
        try:
            require_columns(wanted, columns, uri=name)
        except DataError as error:
            found.append(error)
    return found


@contextmanager
def unreadable_files(name: str, kind: str) -> Iterator[None]:
    """Turn what a reader raises over a damaged file into a `DataError` that names the file."""
    try:
        yield
    except PermissionError as error:
        raise StorageError("access is denied", where=name, mend="check permissions or the S3 credentials") from error
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the file cannot be read (truncated or not {kind}?): {str(error).splitlines()[0]}",
            where=name,
            mend="write the file again, or take it out of the folder",
        ) from error


def require_columns(wanted: dict[str, str], present: Collection[str], *, uri: str) -> None:
    """Refuse a table that lacks a column.

    Args:
        wanted: setting -> column name.
        present: the table's columns.
        uri: named in the error.

    Raises:
        DataError: naming the columns that are missing, those that are there, and the setting that maps them.
    """
    if not present:
        raise DataError("the file holds no rows", where=uri, mend="check the export behind it, or take it out of the folder")
    missing = {setting: column for setting, column in wanted.items() if column not in present}
    if missing:
        raise DataError(
            f"missing column{'s' if len(missing) > 1 else ''}: {', '.join(repr(c) for c in missing.values())}",
            where=f"{uri} has {', '.join(present)}",
            mend=", ".join(dict.fromkeys(_mapping_option(setting) for setting in missing)),
        )


def _mapping_option(setting: str) -> str:
    if setting.startswith("level_rules"):
        return '--set "data.level_rules={4: [YOUR_COLUMN], 3: [YOUR_COLUMN]}"'
    if setting.startswith("signals"):
        return '--set "data.columns.signals={NAME: YOUR_COLUMN}"'
    return f"--set data.columns.{setting}=YOUR_COLUMN"


def ids_as_text(ids: pl.Series) -> pl.Series:
    """Ids as opaque strings; a column of floats holds whole numbers and nulls, anything else in it is no id."""
    if ids.dtype.is_float():
        ids = whole_numbers(ids)
    return ids.cast(pl.String, strict=False)


def whole_numbers(values: pl.Series) -> pl.Series:
    """Numbers, and texts of numbers, as Int64; null where there is no whole number."""
    if values.dtype.is_integer():
        return values.cast(pl.Int64, strict=False)
    if values.dtype == pl.String:
        values = values.str.strip_chars()
    numbers = values.cast(pl.Float64, strict=False)
    rounded = pl.select(pl.when(numbers.is_finite() & (numbers == numbers.floor())).then(numbers)).to_series().cast(pl.Int64, strict=False)
    # A double holds integers up to 2^53 only.
    return values.cast(pl.Int64, strict=False).fill_null(rounded) if values.dtype == pl.String else rounded


def read_frame(uri: str) -> pl.DataFrame:
    """All data files at a URI as one frame, for tables that fit in memory (the catalogue); CSV columns are strings.

    Raises:
        DataError: a file that cannot be read, by name.
    """
    kind, files = data_files(uri)
    fs, _ = storage.filesystem(uri)
    frames = []
    for name in files:
        with unreadable_files(name, kind):
            content = fs.cat_file(name)
            if kind == "parquet":
                frames.append(pl.read_parquet(io.BytesIO(content)))
            elif kind == "csv":
                frames.append(_read_csv(content))
            else:
                frames.append(pl.read_ndjson(io.BytesIO(content), infer_schema_length=None))
    return pl.concat(frames, how="diagonal_relaxed")


@dataclass(frozen=True)
class Piece:
    """What one task reads: a file, or some row groups of a Parquet file."""

    file: str
    first_group: int = 0
    end_group: int = 0


def pieces_of(uri: str) -> list[Piece]:
    """The data files at a URI in pieces of about `BLOCK_BYTES`, as far as their format can be cut."""
    kind, files = data_files(uri)
    if kind != "parquet":
        return [Piece(name) for name in files]
    fs, _ = storage.filesystem(uri)
    pieces = []
    for name in files:
        with unreadable_files(name, kind), fs.open(name, "rb") as stream:
            footer = pq.read_metadata(stream)
        first, size = 0, 0
        for group in range(footer.num_row_groups):
            size += footer.row_group(group).total_byte_size
            if size >= BLOCK_BYTES or group == footer.num_row_groups - 1:
                pieces.append(Piece(name, first, group + 1))
                first, size = group + 1, 0
    return pieces


def read_piece(piece: Piece, columns: list[str], *, uri: str) -> Iterator[pa.Table]:
    """Some columns of a piece in tables that fit in memory.

    Parquet keeps its types. The values of CSV and JSONL come as strings, for a type guessed from the first rows would
    lose what does not fit it; a line that cannot be parsed comes as a row of nulls with the line in the column MALFORMED.

    Raises:
        DataError: the file cannot be read.
    """
    kind, _ = data_files(uri)
    fs, _ = storage.filesystem(uri)
    with unreadable_files(piece.file, kind), fs.open(piece.file, "rb") as stream:
        if kind == "parquet":
            groups = range(piece.first_group, piece.end_group)
            batches = pq.ParquetFile(stream).iter_batches(batch_size=_ROWS, row_groups=groups, columns=columns)
            yield from map(_one_batch, batches)
        elif kind == "csv":
            yield from _csv_tables(stream, columns)
        else:
            yield from _jsonl_tables(stream, columns)


def _one_batch(batch: pa.RecordBatch) -> pa.Table:
    return pa.Table.from_batches([batch])


def _csv_tables(stream: IO[bytes], columns: list[str]) -> Iterator[pa.Table]:
    malformed: list[str] = []

    def keep(row: pa_csv.InvalidRow) -> str:
        # A quote that is never closed swallows the lines after it: count each of them.
        malformed.extend(row.text.splitlines())
        return "skip"

    reader = pa_csv.open_csv(
        stream,
        read_options=pa_csv.ReadOptions(block_size=BLOCK_BYTES),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=keep),
        convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string()), include_columns=columns),
    )
    with reader:
        for batch in reader:
            yield _with_malformed({name: batch.column(name) for name in columns}, [])
    yield _with_malformed({name: pa.array([], pa.string()) for name in columns}, malformed)


def _jsonl_tables(stream: IO[bytes], columns: list[str]) -> Iterator[pa.Table]:
    while lines := list(islice(stream, _ROWS)):
        objects, malformed = _parse_objects(lines)
        yield _with_malformed({name: pa.array([_as_text(o.get(name)) for o in objects], pa.string()) for name in columns}, malformed)


def _with_malformed(columns: dict[str, pa.Array], malformed: list[str]) -> pa.Table:
    rows = len(next(iter(columns.values())))
    good = pa.table({**columns, MALFORMED: pa.nulls(rows, pa.string())})
    bad = {name: pa.nulls(len(malformed), pa.string()) for name in columns}
    return pa.concat_tables([good, pa.table({**bad, MALFORMED: pa.array(malformed, pa.string())})])


def _parse_objects(lines: list[bytes]) -> tuple[list[dict[str, Any]], list[str]]:
    """The JSON objects of some lines, and the lines that are none."""
    objects: list[dict[str, Any]] = []
    malformed: list[str] = []
    for line in filter(bytes.strip, lines):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            malformed.append(line.decode(errors="replace").strip())
    return objects, malformed


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value)


def _keys_of_first_objects(stream: IO[bytes]) -> list[str]:
    lines = list(islice(stream, 1000))
    objects, malformed = _parse_objects(lines)
    if malformed and (not objects or lines[0].strip() == b"["):
        raise pa.ArrowInvalid("its lines are no JSON objects")
    return list(dict.fromkeys(key for found in objects for key in found))


def _read_csv(content: bytes) -> pl.DataFrame:
    return pl.read_csv(io.BytesIO(content), infer_schema=False)
