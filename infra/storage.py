"""Files behind URIs: a local path or s3://, through fsspec; a folder counts only once its manifest is written.

S3 takes endpoint and credentials from the environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE and
whatever else botocore knows. Requests are repeated with back-off, large files travel in parts.

A writer fills a folder and calls `commit`, which hashes every file and writes `manifest.json` last. A reader calls
`open_committed`: without a manifest the folder is half-written and refused, with a wrong hash it is damaged.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from infra.errors import IntegrityError, StorageError

MANIFEST = "manifest.json"
_BLOCK = 1 << 20
_ASIDE = ".aside-"
_S3_ATTEMPTS, _S3_CONNECT_S = 5, 10
_ATTEMPTS = "AWS_MAX_ATTEMPTS"
_S3_PART = 16 << 20  # a file of two parts or more is uploaded in parts, several at a time


@dataclass(frozen=True)
class Manifest:
    """What a committed folder holds.

    Attributes:
        files: relative path -> sha256 in hex.
        metadata: JSON values that the writer added (counts, versions, hashes of inputs).
        created_at: seconds since the epoch.
    """

    files: dict[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)
    created_at: float = 0.0

    @property
    def digest(self) -> str:
        """Hash over all files: equal for equal contents, whatever the time of writing."""
        return hash_json(self.files)


def hash_json(value: object) -> str:
    """sha256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI."""
    return "/".join([uri.rstrip("/"), *parts])


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The fsspec filesystem of a URI and the path inside it.

    Raises:
        StorageError: there is no such kind of storage, or the environment says something of S3 that cannot be.
    """
    options = _s3_options() if is_s3(uri) else {}
    with storage_errors(uri):
        try:
            fs, path = fsspec.core.url_to_fs(uri, **options)
        except ValueError as error:
            raise StorageError(f"no such kind of storage: {error}", where=uri, mend="use a local path or s3://") from error
    return fs, path


def _s3_options() -> dict[str, Any]:
    attempts = os.environ.get(_ATTEMPTS) or str(_S3_ATTEMPTS)
    if not attempts.isdecimal() or int(attempts) < 1:
        raise StorageError(f"{attempts!r} is no number of attempts", where=_ATTEMPTS, mend=f"set {_ATTEMPTS} to 1 or more, or unset it")
    config = {"retries": {"mode": os.environ.get("AWS_RETRY_MODE") or "standard", "total_max_attempts": int(attempts)}}
    # Other processes write to the same folders: a list that is kept would be an old one.
    return {"use_listings_cache": False, "config_kwargs": {**config, "connect_timeout": _S3_CONNECT_S}}


def _variables_behind(message: str) -> str:
    """The AWS_* variables whose values botocore quotes in a message; those that are wrong most often if it quotes none."""
    variables = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_") and value)
    quoted = [name for name, value in variables if re.search(rf"(?<![\w./:-]){re.escape(value)}(?![\w:-]|\.\w)", message)]
    return ", ".join(quoted) or "AWS_ENDPOINT_URL and the credentials"


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The same driver for libraries that take Arrow's file systems, and the path inside it."""
    fs, path = filesystem(uri)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path


def is_s3(uri: str) -> bool:
    """True for an s3:// URI."""
    return uri.startswith(("s3://", "s3a://"))


def is_local(uri: str) -> bool:
    """True for a plain path or file:// URI."""
    return "://" not in uri or uri.startswith("file://")


@contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Turn errors of the file layer into a `StorageError` that says how to mend them."""
    try:
        yield
    except FileNotFoundError as error:
        what = "the bucket does not exist" if is_s3(uri) and "specified bucket" in str(error) else "the path does not exist"
        raise StorageError(what, where=str(error.filename or uri), mend="check the URI") from error
    except PermissionError as error:
        if is_s3(uri):
            keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise StorageError(
                f"S3 denies access: {error}", where=uri, mend=f"check {keys}, what they may do in the bucket, and its name"
            ) from error
        raise StorageError("access is denied", where=uri, mend="check its permissions") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError("the disk is full", where=uri, mend="free some space and run again; finished steps stay") from error
        raise StorageError(f"the storage failed: {error}", where=uri, mend="see `rankgr doctor`") from error
    except ImportError as error:
        raise StorageError(f"no driver for this URI: {error}", where=uri, mend="pip install s3fs") from error
    except Exception as error:
        # botocore's errors have no common base, and of an address that is none it makes a plain ValueError.
        if not type(error).__module__.startswith("botocore.") and not (is_s3(uri) and type(error) is ValueError):
            raise
        raise StorageError(f"S3 cannot be used: {error}", where=uri, mend=f"check {_variables_behind(str(error))}") from error


def exists(uri: str) -> bool:
    """True where a file or folder exists."""
    fs, path = filesystem(uri)
    with storage_errors(uri):
        return bool(fs.exists(path))


def list_files(uri: str, suffix: str = "") -> list[str]:
    """Relative paths of all files below a folder, sorted."""
    fs, path = filesystem(uri)
    with storage_errors(uri):
        found = fs.find(path, detail=True)
    # Some S3 servers list a folder whose files are gone.
    relative = (os.path.relpath(f, path) for f, info in found.items() if f.endswith(suffix) and info["type"] != "directory")
    return sorted(name for name in relative if not os.path.basename(name).startswith(_ASIDE))  # of a writer that was killed


def read_bytes(uri: str, *, first: int | None = None) -> bytes:
    """Contents of a file, or so many bytes from its start."""
    fs, path = filesystem(uri)
    with storage_errors(uri):
        return bytes(fs.cat_file(path, start=None if first is None else 0, end=first))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically: aside first and renamed locally, in one put on S3."""
    fs, path = filesystem(uri)
    with storage_errors(uri):
        if not is_local(uri):
            fs.pipe_file(path, data, **({"chunksize": _S3_PART} if is_s3(uri) else {}))
            return
        folder = os.path.dirname(path) or "."
        os.makedirs(folder, exist_ok=True)
        aside = os.path.join(folder, f"{_ASIDE}{secrets.token_hex(8)}")
        try:
            with open(aside, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)
            raise


def read_json(uri: str) -> Any:
    """A JSON file.

    Raises:
        IntegrityError: it holds no JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise IntegrityError(f"not a readable JSON file: {error}", where=uri, mend="run the step again with --fresh") from error


def write_json(uri: str, value: object) -> None:
    """Write a JSON file atomically."""
    write_bytes(uri, json.dumps(value, indent=2, sort_keys=True).encode())


def read_table(uri: str) -> pa.Table:
    """A Parquet file, or all Parquet files of a folder in the order of their names."""
    fs, path = filesystem(uri)
    with storage_errors(uri):
        names = sorted(name for name in fs.ls(path, detail=False) if name.endswith(".parquet")) if fs.isdir(path) else [path]
        if not names:
            raise FileNotFoundError(errno.ENOENT, "no Parquet file", uri)
        return pa.concat_tables([_parse_parquet(fs.cat_file(name), name) for name in names])


def _parse_parquet(content: bytes, name: str) -> pa.Table:
    # On this thread alone: one of Arrow's that outlives the interpreter by a moment aborts the process (apache/arrow#34314).
    with _parquet_errors(name), pq.ParquetFile(pa.BufferReader(content), pre_buffer=False) as file:
        return file.read(use_threads=False)


def read_batches(path: Path, columns: Sequence[str], *, rows: int) -> Iterator[pa.RecordBatch]:
    """Columns of a Parquet file of this machine (`local_copy`), at most so many rows at a time and no more of them in memory.

    Raises:
        IntegrityError: it is no Parquet file.
    """
    # Buffers that are read ahead would hold whole row groups.
    with storage_errors(str(path)), _parquet_errors(str(path)), pq.ParquetFile(path, buffer_size=_BLOCK, pre_buffer=False) as file:
        yield from file.iter_batches(rows, columns=list(columns))


def count_rows(path: Path) -> int:
    """Rows of a Parquet file of this machine.

    Raises:
        IntegrityError: it is no Parquet file.
    """
    with storage_errors(str(path)), _parquet_errors(str(path)):
        return int(pq.read_metadata(path).num_rows)


@contextmanager
def _parquet_errors(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise IntegrityError(f"not a readable Parquet file: {first_line}", where=name, mend="write the file again") from error


def write_table(table: pa.Table, uri: str) -> None:
    """Write one Parquet file atomically (zstd)."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(uri, sink.getvalue())


def remove(uri: str) -> None:
    """Delete a file or folder if it is there."""
    fs, path = filesystem(uri)
    with storage_errors(uri):
        if fs.exists(path):
            fs.rm(path, recursive=True)


def commit(uri: str, metadata: Mapping[str, Any] | None = None) -> Manifest:
    """Hash every file of a folder and write its manifest, which makes the folder count.

    Raises:
        StorageError: the folder is not writable.
    """
    files = {name: _sha256(join(uri, name)) for name in list_files(uri) if name != MANIFEST}
    manifest = Manifest(files, dict(metadata or {}), time.time())
    write_json(join(uri, MANIFEST), asdict(manifest))
    return manifest


def read_manifest(uri: str) -> Manifest | None:
    """The manifest of a folder, or None where it was never committed."""
    if not exists(join(uri, MANIFEST)):
        return None
    return Manifest(**read_json(join(uri, MANIFEST)))


def open_committed(uri: str, *, verify: bool = True) -> Manifest:
    """The manifest of a folder after all its hashes have been checked.

    Raises:
        IntegrityError: no manifest, a missing file, or a file whose hash differs.
    """
    manifest = read_manifest(uri)
    if manifest is None:
        raise IntegrityError("the folder was never committed (half-written?)", where=uri, mend="run the step again")
    for name, expected in manifest.files.items() if verify else ():
        where = join(uri, name)
        if not exists(where):
            raise IntegrityError("a file of the manifest is missing", where=where, mend="run the step again with --fresh")
        if _sha256(where) != expected:
            raise IntegrityError("the file does not match its sha256", where=where, mend="run the step again with --fresh")
    return manifest


@contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local path with the contents of a file or folder; remote ones are fetched to a temporary folder."""
    fs, path = filesystem(uri)
    if is_local(uri):
        yield Path(path)
        return
    folder = tempfile.mkdtemp(prefix="rankgr-")
    try:
        with storage_errors(uri):
            target = os.path.join(folder, os.path.basename(path.rstrip("/")))
            fs.get(path.rstrip("/"), target, recursive=fs.isdir(path))
        yield Path(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sha256(uri: str) -> str:
    fs, path = filesystem(uri)
    digest = hashlib.sha256()
    with storage_errors(uri), fs.open(path, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
