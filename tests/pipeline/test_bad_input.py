"""What a user meets at the terminal when something is wrong: the exit code, and a message that names it and the mend."""

from __future__ import annotations

import socket
from pathlib import Path

import polars as pl
import pytest

from infra.local import free_port
from tests.command import Finished, rankgr
from tests.logs import SETTINGS, write_log


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_log(tmp_path_factory.mktemp("log"))


def run(log: tuple[Path, Path], *more: str, settings: list[str] = SETTINGS) -> tuple[int, str]:
    events, items = log
    done = rankgr("run", "--preset", "tiny", "--logs", str(events), "--items", str(items), *settings, *more, folder=events.parent)
    return done.returncode, done.stderr


def test_a_missing_column_is_named_with_those_there_and_the_setting_that_maps_it(log: tuple[Path, Path]) -> None:
    code, message = run(log, settings=[])
    assert code == 3
    for part in ("'user_id'", "has uid, sku, at, stage", "--set data.columns.user_id=YOUR_COLUMN"):
        assert part in message


def test_an_unknown_setting_is_refused_with_the_nearest_known_one(log: tuple[Path, Path]) -> None:
    code, message = run(log, "--set", "training.epoch=3")
    assert code == 2
    assert "did you mean 'training.epochs'" in message


def test_a_log_that_is_not_there_is_named(log: tuple[Path, Path]) -> None:
    code, message = run((log[0].with_name("gone.csv"), log[1]))
    assert code == 3
    assert "gone.csv" in message


def test_a_truncated_parquet_file_is_named_before_anything_starts(log: tuple[Path, Path], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.parquet", tmp_path / "cut.parquet"
    pl.read_csv(log[0]).write_parquet(whole)
    cut.write_bytes(whole.read_bytes()[:-100])
    whole.unlink()
    code, message = run((cut, log[1]))
    assert code == 3
    assert "cut.parquet" in message
    assert "write the file again" in message


def test_a_redis_that_does_not_answer_is_noticed_before_the_work(log: tuple[Path, Path]) -> None:
    port = free_port()
    code, message = run(log, "--set", f"slate_store.url=redis://:secret@127.0.0.1:{port}/0")
    assert code == 6
    assert f"127.0.0.1:{port}" in message
    assert "secret" not in message
    assert "step=sessions" not in message


def test_too_many_bad_rows_stop_the_run_and_say_why(log: tuple[Path, Path]) -> None:
    code, message = run(log, "--set", "data.timestamp_unit=ms")
    assert code == 3
    assert "are these seconds?" in message
    assert "--set data.timestamp_unit=s" in message


def test_a_taken_port_is_named_with_the_way_out(finished: Finished) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = rankgr("serve", "--set", f"serving.port={port}", folder=finished.folder)
    assert done.returncode == 6
    assert f"port {port} is taken" in done.stderr
    assert "serving.port=0" in done.stderr


def test_no_finished_run_is_said_with_the_command_that_makes_one(tmp_path: Path) -> None:
    done = rankgr("report", folder=tmp_path)
    assert done.returncode == 1
    assert "rankgr quickstart" in done.stderr
