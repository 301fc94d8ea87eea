"""Reviews with days for times become purchases in the published order."""

from pathlib import Path

import polars as pl
import pytest

from tests.benchmarks.amazon import beauty_events, beauty_items
from tests.benchmarks.data import data_folder

DAY = 86_400


def interactions(**users: list[int | None]) -> pl.DataFrame:
    """Reviews by user and day, listed backwards."""
    rows = [
        {"user_id": user, "item_id": f"{user}{place}", "position": place, "timestamp": None if day is None else day * DAY}
        for user, days in users.items()
        for place, day in enumerate(days)
    ]
    return pl.DataFrame(rows[::-1], schema_overrides={"timestamp": pl.Int64})


def times(**users: list[int | None]) -> list[int]:
    return beauty_events(interactions(**users))["timestamp"].to_list()


def test_purchases_of_one_day_keep_their_place() -> None:
    events = beauty_events(interactions(a=[100, 100, 101]))
    assert events["item_id"].to_list() == ["a0", "a1", "a2"]
    assert events["timestamp"].to_list() == [100 * DAY * 1000, 100 * DAY * 1000 + 1, 101 * DAY * 1000 + 2]


def test_a_day_that_goes_back_is_moved_up() -> None:
    assert times(a=[100, 90, 101]) == [100 * DAY * 1000, 100 * DAY * 1000 + 1, 101 * DAY * 1000 + 2]


def test_a_missing_day_is_the_one_before_it_or_else_the_next() -> None:
    assert times(a=[None, 100, None, 102]) == [(day * DAY) * 1000 + place for place, day in enumerate([100, 100, 100, 102])]


def test_a_user_without_any_day_gets_the_first_one_of_the_set() -> None:
    assert times(a=[None, None], b=[90, 100])[:2] == [90 * DAY * 1000, 90 * DAY * 1000 + 1]


def test_days_of_one_user_do_not_reach_the_next() -> None:
    assert times(a=[200], b=[None, 100])[1] == 100 * DAY * 1000


def test_brands_and_categories_are_the_text_of_an_item() -> None:
    items = beauty_items(pl.DataFrame({"item_id": ["x"], "attributes": [["Prada", "Eau de Parfum"]], "more": [1]}))
    assert items.to_dicts() == [{"item_id": "x", "category": "Prada Eau de Parfum"}]


def test_a_data_set_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANKGR_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="amazon14_beauty"):
        data_folder("amazon14_beauty")
