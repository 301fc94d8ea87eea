"""Parquet, CSV and JSONL are found, looked through and read; what is wrong with them is named before the work starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.sessions import sources
from components.sessions.job import check_sources
from components.sessions.sources import MALFORMED, column_names, data_files, pieces_of, read_frame, read_piece
from infra.config import load_config
from infra.errors import DataError

COLUMNS = ["user_id", "item_id", "timestamp", "level"]


def rows_of(path: Path, columns: list[str] = COLUMNS) -> list[dict[str, Any]]:
    tables = [table for piece in pieces_of(str(path)) for table in read_piece(piece, columns, uri=str(path))]
    return [row for table in tables for row in table.to_pylist()]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def check(logs: Path, *settings: str) -> None:
    check_sources(load_config(overrides=[f"data.logs={logs}", *settings]).data)


def test_no_logs_at_all_say_which_option_is_missing() -> None:
    with pytest.raises(DataError, match="no logs were given") as caught:
        data_files("")
    assert "--logs" in caught.value.mend


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as caught:
        data_files(str(tmp_path / "nowhere"))
    assert caught.value.where.endswith("nowhere")


def test_a_folder_of_several_formats_or_of_none_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "")
    with pytest.raises(DataError, match="no Parquet, CSV or JSONL file"):
        data_files(str(tmp_path))
    write(tmp_path / "a.csv", "")
    write(tmp_path / "b.jsonl", "")
    with pytest.raises(DataError, match="several formats: csv, jsonl"):
        data_files(str(tmp_path))


def test_all_files_of_a_folder_are_found_in_order(tmp_path: Path) -> None:
    (tmp_path / "day=2").mkdir()
    files = [write(tmp_path / name, "a\n") for name in ("b.csv", "a.csv", "day=2/c.csv")]
    kind, found = data_files(str(tmp_path))
    assert kind == "csv"
    assert found == sorted(map(str, files))


def test_a_missing_column_is_named_with_those_present_and_the_setting_that_maps_it(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "uid,item_id,when,level\n")
    with pytest.raises(DataError) as caught:
        check(log)
    assert caught.value.what == "missing columns: 'user_id', 'timestamp'"
    assert caught.value.where == f"{log} has uid, item_id, when, level"
    assert caught.value.mend == "--set data.columns.user_id=YOUR_COLUMN, --set data.columns.timestamp=YOUR_COLUMN"
    check(log, "data.columns.user_id=uid", "data.columns.timestamp=when")


def test_a_missing_column_of_a_level_rule_is_mended_by_the_rules(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp\n")
    with pytest.raises(DataError, match="missing column: 'is_like'") as caught:
        check(log, "data.level_rules={4: [is_like]}")
    assert "data.level_rules=" in caught.value.mend


def test_the_one_file_of_a_folder_that_lacks_a_column_is_named(tmp_path: Path) -> None:
    pl.DataFrame({key: [1] for key in COLUMNS}).write_parquet(tmp_path / "a.parquet")
    pl.DataFrame({key: [1] for key in COLUMNS[:3]}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="missing column: 'level'") as caught:
        check(tmp_path)
    assert "b.parquet has user_id, item_id, timestamp" in caught.value.where


def test_item_files_are_looked_at_too(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", ",".join(COLUMNS) + "\n")
    items = write(tmp_path / "items.csv", "id,title\n")
    with pytest.raises(DataError, match="missing column: 'item_id'") as caught:
        check(log, f"data.items={items}")
    assert str(items) in caught.value.where


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    pl.DataFrame({key: [1] for key in COLUMNS}).write_parquet(tmp_path / "whole.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="truncated or not parquet") as caught:
        check(tmp_path)
    assert caught.value.where == str(tmp_path / "cut.parquet")


def test_damage_inside_a_parquet_file_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pl.DataFrame(dict.fromkeys(COLUMNS, range(100))).write_parquet(path, compression="uncompressed")
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(0xFF ^ byte for byte in content[4:200])
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read") as caught:
        rows_of(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(("name", "text"), [("log.csv", ""), ("log.jsonl", "")])
def test_an_empty_text_file_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError) as caught:
        check(write(tmp_path / name, text))
    assert str(tmp_path / name) in caught.value.where


def test_a_json_array_is_not_json_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its lines are no JSON objects"):
        check(write(tmp_path / "log.json", '[\n  {"user_id": 1}\n]\n'))


def test_csv_values_come_as_they_are_written(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", 'user_id,item_id,timestamp,level,note\n007,"a,b",17,3,\n8,c,x,,"two\nlines"\n')
    assert [[row[name] for name in COLUMNS] for row in rows_of(log)] == [["007", "a,b", "17", "3"], ["8", "c", "x", ""]]


def test_a_csv_line_with_too_few_or_too_many_values_is_kept_aside(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", "user_id,item_id,timestamp,level\nu,i,17,3\nu,i,17\nu,i,17,3,4\nv,i,17,3\n")
    rows = rows_of(log)
    assert [row["user_id"] for row in rows if row[MALFORMED] is None] == ["u", "v"]
    assert [row[MALFORMED] for row in rows if row[MALFORMED] is not None] == ["u,i,17", "u,i,17,3,4"]


def test_lines_swallowed_by_an_open_quote_are_counted_one_by_one(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", 'user_id,item_id,timestamp,level\nu,i,17,3\nu,"i,17,3\nv,i,17,3\nw,i,17,3\n')
    rows = rows_of(log)
    assert len(rows) == 4
    assert [row[MALFORMED] for row in rows[1:]] == ['u,"i,17,3', "v,i,17,3", "w,i,17,3"]


def test_a_csv_file_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_bytes("user_id,item_id,timestamp,level\nJosé,i,17,3\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF8") as caught:
        rows_of(log)
    assert caught.value.where == str(log)


def test_json_lines_keep_whatever_is_no_object_aside(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log.jsonl",
        '{"user_id": 7, "item_id": "007", "timestamp": 17.0, "level": 3}\n\n{"user_id": \n[1]\n{"user_id": true, "item_id": null}\n',
    )
    rows = rows_of(log)
    assert [[row[name] for name in COLUMNS] for row in rows[:2]] == [["7", "007", "17", "3"], ["true", None, None, None]]
    assert [row[MALFORMED] for row in rows] == [None, None, '{"user_id":', "[1]"]


def test_a_key_that_some_json_lines_leave_out_is_a_column(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"user_id": 1}\n{"user_id": 2, "level": 3}\n')
    write(tmp_path / "b.jsonl", '{"user_id": 1, "item_id": 2}\n')
    assert column_names(str(tmp_path)) == ["user_id", "level", "item_id"]


def test_parquet_is_cut_into_pieces_along_its_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table(dict.fromkeys(COLUMNS, range(10))), path, row_group_size=4)
    assert [(piece.first_group, piece.end_group) for piece in pieces_of(str(path))] == [(0, 3)]
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1)
    assert [(piece.first_group, piece.end_group) for piece in pieces_of(str(path))] == [(0, 1), (1, 2), (2, 3)]
    assert [row["level"] for row in rows_of(path)] == list(range(10))


def test_item_files_with_different_columns_are_joined(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "item_id,title\n01,A\n")
    write(tmp_path / "b.csv", "item_id,brand\n2,B\n")
    assert read_frame(str(tmp_path)).to_dicts() == [
        {"item_id": "01", "title": "A", "brand": None},
        {"item_id": "2", "title": None, "brand": "B"},
    ]


def test_all_files_that_cannot_be_used_are_named_at_once(tmp_path: Path) -> None:
    headers = {"a": "user_id,item_id,level", "b": "", "c": "user_id,timestamp,level", "d": "user_id,item_id,timestamp,level"}
    for name, header in headers.items():
        write(tmp_path / f"{name}.csv", f"{header}\n" if header else "")
    with pytest.raises(DataError) as caught:
        check(tmp_path)
    first, *lines = str(caught.value).splitlines()
    assert first == "3 things are wrong:"
    assert [next(name for name in "abcd" if f"/{name}.csv" in line) for line in lines] == ["b", "a", "c"]
