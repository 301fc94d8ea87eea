"""Items of the user's table and of the logs become one catalogue; bad rows are kept aside."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from components.sessions.catalogue import build_catalogue, catalogue_table
from infra.config import load_config
from infra.errors import DataError
from infra.records import CATALOGUE
from infra.sections import DataConfig


def data(path: Path | str, *settings: str) -> DataConfig:
    return load_config(overrides=[f"data.items={str(path)!r}", *settings]).data


def items(tmp_path: Path, frame: dict[str, object]) -> Path:
    path = tmp_path / "items.parquet"
    pl.DataFrame(frame).write_parquet(path)
    return path


def test_items_are_numbered_in_the_order_of_their_ids(tmp_path: Path) -> None:
    path = items(tmp_path, {"item_id": ["b", "a"], "title": ["Bee", "Ant"], "category": ["x", None], "brand": ["p", "q"]})
    catalogue, bad, counts = build_catalogue(data(path), ["a", "b"])
    assert catalogue.select("item_index", "item_id", "title", "text", "category", "brand").rows() == [
        (0, "a", "Ant", "Ant  q", "", "q"),
        (1, "b", "Bee", "Bee x p", "x", "p"),
    ]
    assert bad.is_empty()
    assert counts == {"items": 2, "items_without_features": 0, "bad_items": 0}


def test_an_item_of_the_log_alone_takes_part_without_text(tmp_path: Path) -> None:
    path = items(tmp_path, {"item_id": [1], "title": ["One"]})
    catalogue, _, counts = build_catalogue(data(path), ["2", "1", "2"])
    assert catalogue.select("item_id", "title", "text", "embedding").rows() == [("1", "One", "One", None), ("2", "2", "", None)]
    assert counts["items_without_features"] == 1


def test_without_an_item_table_the_log_names_the_items() -> None:
    catalogue, bad, counts = build_catalogue(data(""), ["b", "a"])
    assert catalogue["title"].to_list() == ["a", "b"]
    assert len(bad) == 0
    assert counts == {"items": 2, "items_without_features": 2, "bad_items": 0}


def test_bad_rows_are_quarantined_with_their_reason(tmp_path: Path) -> None:
    path = items(
        tmp_path,
        {
            "item_id": ["a", "a", None, "", "n", "f", "g"],
            "title": ["first", "second", "x", "y", "z", "inf", "fine"],
            "embedding": [[1.0], [1.0], [1.0], [1.0], [float("nan")], [float("inf")], [2.0]],
        },
    )
    catalogue, bad, counts = build_catalogue(data(path), ["n"])
    assert bad["reason"].to_list() == [
        "the item id occurs twice",
        "no item id",
        "no item id",
        "the embedding holds NaN or infinity",
        "the embedding holds NaN or infinity",
    ]
    assert json.loads(bad["raw"][0])["title"] == "second"
    assert catalogue["title"].to_list() == ["first", "fine", "n"]
    assert counts == {"items": 3, "items_without_features": 1, "bad_items": 5}


def test_a_missing_value_inside_an_embedding_is_not_finite(tmp_path: Path) -> None:
    path = items(tmp_path, {"item_id": ["a", "b"], "embedding": [[1.0, None], None]})
    catalogue, bad, _ = build_catalogue(data(path), [])
    assert bad["reason"].to_list() == ["the embedding holds NaN or infinity"]
    assert catalogue["item_id"].to_list() == ["b"]


def test_lists_and_numbers_are_text_too(tmp_path: Path) -> None:
    path = items(tmp_path, {"item_id": [1.0, 2.0], "title": [1994, 1995], "tags": [["war", "epic"], []]})
    catalogue, _, _ = build_catalogue(data(path, "data.columns.text=[title, tags, nowhere]"), [])
    assert catalogue.select("item_id", "title", "text").rows() == [("1", "1994", "1994 war epic"), ("2", "1995", "1995")]


def test_ids_of_a_text_file_keep_their_leading_zeros(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\n007,Bond\n")
    catalogue, _, counts = build_catalogue(data(path), ["007"])
    assert catalogue["item_id"].to_list() == ["007"]
    assert counts["items_without_features"] == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [("items.jsonl", '{"item_id": 1}\n{broken\n'), ("items.csv", "item_id,title\n1,a,b,c\n"), ("items.parquet", "PAR1 cut")],
)
def test_a_damaged_item_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="cannot be read") as caught:
        build_catalogue(data(tmp_path / name), [])
    assert caught.value.where == str(tmp_path / name)


def test_an_embedding_column_of_text_is_refused(tmp_path: Path) -> None:
    path = items(tmp_path, {"item_id": ["a"], "embedding": ["[1, 2]"]})
    with pytest.raises(DataError, match="wrong type"):
        build_catalogue(data(path), [])


def test_the_table_has_the_catalogues_schema(tmp_path: Path) -> None:
    path = items(tmp_path, {"item_id": ["a", "b"], "embedding": [[1, 2], None]})
    catalogue, _, _ = build_catalogue(data(path), [])
    table = catalogue_table(catalogue, [5, 0])
    assert table.schema == CATALOGUE
    assert table["popularity"].to_pylist() == [5, 0]
    assert table["embedding"].to_pylist() == [[1.0, 2.0], None]
