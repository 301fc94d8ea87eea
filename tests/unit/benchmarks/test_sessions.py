"""The sessions benchmark: one polars process makes the rows that the product makes, and a difference is seen."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from components.sessions.job import TIMELINES_FOLDER
from tests.benchmarks.sessions import by_polars, our_seconds, same_rows, write_log

ROWS = 3000

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_both_sides_make_the_same_timelines_and_a_wrong_one_is_told(tmp_path: Path) -> None:
    write_log(tmp_path / "log", ROWS)
    (tmp_path / "theirs").mkdir()
    by_polars(tmp_path / "log", tmp_path / "theirs")
    our_seconds(tmp_path / "log", ROWS, tmp_path / "ours")
    assert same_rows(tmp_path / "ours", tmp_path / "theirs")
    part = next((tmp_path / "ours" / TIMELINES_FOLDER).glob("*.parquet"))
    pl.read_parquet(part).with_columns(pl.col("levels").list.reverse()).write_parquet(part)
    assert not same_rows(tmp_path / "ours", tmp_path / "theirs")
