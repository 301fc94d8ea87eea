"""Raw logs end to end over Ray: what comes out, what is kept aside, when the run stops."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data

from components.sessions import job, sources
from components.sessions.job import prepare_sessions
from infra import records as r
from infra import storage
from infra.config import Config, load_config
from infra.errors import DataError, StorageError
from infra.steps import Run, job_main

pytestmark = pytest.mark.usefixtures("ray_cluster")

NOW_MS, HOUR_MS = 1_700_000_000_000, 3_600_000
COLUMNS = ["user_id", "item_id", "timestamp", "level"]


def good_events() -> list[tuple[object, ...]]:
    """Ten users with six clicks each, an hour apart; a duplicate, a repetition at a lower level, a user with one event."""
    rows: list[tuple[object, ...]] = [
        (f"u{user}", f"i{user + 3 * place:02}", NOW_MS + place * HOUR_MS, 3) for user in range(10) for place in range(6)
    ]
    return [*rows, rows[0], ("u0", "i00", NOW_MS + 1000, 2), ("loner", "i00", NOW_MS, 4)]


BAD_EVENTS: list[tuple[object, ...]] = [("u1", "i01", NOW_MS, 5), ("u2", "i02", NOW_MS // 1000, 3)]


def frame(rows: list[tuple[object, ...]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=COLUMNS, orient="row")


def config(logs: Path, *overrides: str) -> Config:
    return load_config(overrides=[f"data.logs={logs}", "data.shards=2", *overrides])


def outcome(folder: str | Path) -> dict[str, Any]:
    """What must not depend on format, shards or blocks."""
    timelines = sorted(storage.read_table(f"{folder}/timelines").to_pylist(), key=lambda row: str(row["user_id"]))
    return {"timelines": timelines, "catalogue": storage.read_table(f"{folder}/catalogue.parquet").to_pylist()}


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Output folder and counts of a log and a catalogue with a few bad rows each."""
    folder = tmp_path_factory.mktemp("dirty")
    frame([*good_events(), *BAD_EVENTS]).write_parquet(folder / "log.parquet")
    items = [(f"i{number:02}", f"Title {number}", [1.0, float(number)]) for number in range(40) if number != 5]
    items[1] = ("i01", "Title 1", [1.0, float("nan")])
    pl.DataFrame(items, schema=["item_id", "title", "embedding"], orient="row").write_parquet(folder / "items.parquet")
    counts = prepare_sessions(config(folder / "log.parquet", f"data.items={folder / 'items.parquet'}"), str(folder / "out"))
    return folder / "out", counts


def test_every_row_is_accounted_for(dirty: tuple[Path, dict[str, Any]]) -> None:
    assert dirty[1] == {
        "raw_rows": 65,
        "quarantined": 2,
        "reasons": {"the level is not one of 1, 2, 3, 4": 1, "the timestamp lies before 1990: are these seconds?": 1},
        "events": 61,
        "users": 11,
        "duplicates": 1,
        "merged": 1,
        "users_with_one_event": 1,
        "items": 40,
        "items_without_features": 2,
        "bad_items": 1,
    }


def test_bad_events_lie_in_the_quarantine_with_reason_and_raw_row(dirty: tuple[Path, dict[str, Any]]) -> None:
    table = pq.read_table(dirty[0] / "quarantine" / "events.parquet")
    assert table.schema == r.QUARANTINE
    rows = {row["reason"]: json.loads(row["raw"]) for row in table.to_pylist()}
    assert rows == {
        "the level is not one of 1, 2, 3, 4": dict(zip(COLUMNS, BAD_EVENTS[0], strict=True)),
        "the timestamp lies before 1990: are these seconds?": dict(zip(COLUMNS, BAD_EVENTS[1], strict=True)),
    }


def test_an_item_with_a_bad_embedding_is_quarantined_and_still_takes_part(dirty: tuple[Path, dict[str, Any]]) -> None:
    [row] = pq.read_table(dirty[0] / "quarantine" / "items.parquet").to_pylist()
    assert (row["source"], row["reason"]) == ("items", "the embedding holds NaN or infinity")
    items = {row["item_id"]: row for row in outcome(dirty[0])["catalogue"]}
    assert (items["i01"]["title"], items["i01"]["embedding"]) == ("i01", None)
    assert (items["i05"]["title"], items["i05"]["text"]) == ("i05", "")
    assert items["i07"]["title"] == "Title 7"


def test_timelines_hold_indices_levels_and_phases(dirty: tuple[Path, dict[str, Any]]) -> None:
    rows = {row["user_id"]: row for row in outcome(dirty[0])["timelines"]}
    assert rows["u0"]["items"] == [0, 3, 6, 9, 12, 15]
    assert rows["u0"]["levels"] == [3] * 6
    assert rows["u0"]["requests"] == [0, 1, 2, 3, 4, 5]
    assert rows["u0"]["phases"] == [0, 0, 0, 0, 1, 2]
    assert (rows["loner"]["items"], rows["loner"]["phases"]) == ([0], [0])


def test_popularity_counts_the_positives_of_training(dirty: tuple[Path, dict[str, Any]]) -> None:
    popularity = {row["item_id"]: row["popularity"] for row in outcome(dirty[0])["catalogue"]}
    # i03 is u0's second and u3's first click; i12 is u0's fifth (validation), u3's fourth, u6's third and u9's second.
    assert (popularity["i03"], popularity["i12"], popularity["i00"], popularity["i39"]) == (2, 3, 2, 0)


def test_what_is_popular_in_a_segment_of_users_is_counted_by_the_log(tmp_path: Path) -> None:
    segments = ["north", "south", None, ""]
    rows = [(*row, segments[index % 4]) for index, row in enumerate(good_events())]
    pl.DataFrame(rows, schema=[*COLUMNS, "region"], orient="row").write_parquet(tmp_path / "log.parquet")
    counts = prepare_sessions(config(tmp_path / "log.parquet", "data.columns.segment=region"), str(tmp_path / "out"))
    assert counts["segments"] == 2
    expected: dict[str, Counter[str]] = {"north": Counter(), "south": Counter()}
    for _, item, _, level, segment in rows:
        if segment and int(str(level)) >= 3:
            expected[str(segment)][str(item)] += 1
    found: dict[str, dict[str, int]] = {"north": {}, "south": {}}
    for row in outcome(tmp_path / "out")["catalogue"]:
        for entry in row["segments"] or ():
            found[entry["segment"]][row["item_id"]] = entry["popularity"]
    assert found == expected


def write_csv(rows: pl.DataFrame, folder: Path) -> Path:
    rows.write_csv(folder / "log.csv")
    return folder / "log.csv"


def write_jsonl(rows: pl.DataFrame, folder: Path) -> Path:
    rows.write_ndjson(folder / "log.jsonl")
    return folder / "log.jsonl"


def write_many_parquet_files(rows: pl.DataFrame, folder: Path) -> Path:
    for number, part in enumerate(rows.reverse().iter_slices(30)):
        # The second file has other types: numbers as text.
        part = part.with_columns(pl.col("timestamp", "level").cast(pl.String)) if number == 1 else part
        pq.write_table(part.to_arrow(), folder / f"{number}.parquet", row_group_size=7)
    return folder


@pytest.mark.parametrize(
    ("write", "shards"), [(write_csv, 1), (write_jsonl, 3), (write_many_parquet_files, 40)], ids=["csv", "jsonl", "many Parquet files"]
)
def test_format_files_blocks_and_shards_do_not_change_the_outcome(
    dirty: tuple[Path, dict[str, Any]],
    write: Callable[[pl.DataFrame, Path], Path],
    shards: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1)
    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 500)
    logs = tmp_path / "logs"
    logs.mkdir()
    written = write(frame([*good_events(), *BAD_EVENTS]), logs)
    items = dirty[0].parent / "items.parquet"
    counts = prepare_sessions(config(written, f"data.items={items}", f"data.shards={shards}"), str(tmp_path / "out"))
    assert counts == dirty[1]
    assert outcome(tmp_path / "out") == outcome(dirty[0])
    assert ray.data.DataContext.get_current().target_max_block_size == 500


def test_a_broken_csv_line_is_quarantined_as_it_was(tmp_path: Path) -> None:
    text = frame(good_events()).write_csv()
    (tmp_path / "log.csv").write_text(text + "u1,i01\n")
    counts = prepare_sessions(config(tmp_path / "log.csv"), str(tmp_path / "out"))
    assert counts["reasons"] == {"the line cannot be parsed": 1}
    [row] = pq.read_table(tmp_path / "out" / "quarantine" / "events.parquet").to_pylist()
    assert json.loads(row["raw"]) == {"line": "u1,i01"}


def run_job(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["sessions", *arguments])
    with pytest.raises(SystemExit) as ended:
        job_main(job.step, ())
    return ended.value.code


def test_too_many_bad_rows_end_the_job_with_exit_code_3_reasons_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("u", "i", NOW_MS // 1000, 3)] * 3 + [("u", "i", NOW_MS, 0)] * 1 + [("u", f"i{n}", NOW_MS, 3) for n in range(16)]
    frame(rows).write_parquet(tmp_path / "log.parquet")
    code = run_job(monkeypatch, "--set", f"data.logs={tmp_path / 'log.parquet'}", "--set", f"workspace={tmp_path / 'ws'}")
    message = capsys.readouterr().err
    assert code == DataError.exit_code == 3
    assert "4 of 20 events are bad (20.0%, allowed 5.0%): the timestamp lies before 1990: are these seconds?: 3; the level" in message
    assert "--set data.timestamp_unit=s or repair the file or raise data.max_bad_fraction" in message
    [quarantined] = (tmp_path / "ws").rglob("quarantine/events.parquet")
    assert pq.read_metadata(quarantined).num_rows == 4
    assert not list((tmp_path / "ws").rglob("manifest.json"))


def test_too_many_bad_items_stop_the_run_too(tmp_path: Path) -> None:
    frame(good_events()).write_parquet(tmp_path / "log.parquet")
    (tmp_path / "items.jsonl").write_text('{"item_id": "i00"}\n' * 4)
    with pytest.raises(DataError, match=r"3 of 4 items are bad \(75.0%, allowed 5.0%\): the item id occurs twice: 3"):
        prepare_sessions(config(tmp_path / "log.parquet", f"data.items={tmp_path / 'items.jsonl'}"), str(tmp_path / "out"))


@pytest.mark.parametrize("text", ["user_id,item_id,timestamp,level\n", "PARQUET"])
def test_an_empty_log_is_refused(tmp_path: Path, text: str) -> None:
    log = tmp_path / "log.csv"
    log.write_text(text)
    if text == "PARQUET":
        log = tmp_path / "log.parquet"
        pq.write_table(pa.table({name: pa.array([], pa.int64()) for name in COLUMNS}), log)
    with pytest.raises(DataError, match="the log holds no events"):
        prepare_sessions(config(log), str(tmp_path / "out"))


def test_an_error_inside_a_ray_task_keeps_its_type_and_message(tmp_path: Path) -> None:
    frame(good_events()).write_csv(tmp_path / "log.csv")
    with (tmp_path / "log.csv").open("ab") as log:
        log.write("Müller,i01,1,3\n".encode("latin-1"))
    with pytest.raises(DataError) as caught:
        prepare_sessions(config(tmp_path / "log.csv"), str(tmp_path / "out"))
    assert type(caught.value) is DataError
    assert caught.value.where == str(tmp_path / "log.csv")


def test_an_output_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    frame(good_events()).write_parquet(tmp_path / "log.parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        prepare_sessions(config(tmp_path / "log.parquet"), str(tmp_path / "file" / "out"))
    assert type(caught.value) is StorageError


def test_the_step_is_skipped_until_the_log_changes(tmp_path: Path) -> None:
    log = tmp_path / "log.parquet"
    frame(good_events()).write_parquet(log)
    run = Run(config(log, f"workspace={tmp_path / 'ws'}"))
    first, second = job.step(run), job.step(run)
    assert (first.skipped, second.skipped) == (False, True)
    assert second.uri == first.uri
    assert second.metadata["events"] == 61
    frame(good_events()[1:]).write_parquet(log)
    third = job.step(run)
    assert not third.skipped
    assert third.uri != first.uri
