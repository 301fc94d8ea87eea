"""Ctrl-C in the middle of the main job: nothing is left running, and the next run goes on where it stopped."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.command import COMMAND, environment, rankgr
from tests.logs import SETTINGS, write_log

LONG = ["--set", "training.epochs=12", "--set", "training.checkpoint_every_epochs=1"]


def _wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], output: Path, deadline_s: float = 120) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end and process.poll() is None, output.read_text()[-3000:]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)


def _of_this_run(folder: Path) -> list[psutil.Process]:
    """Processes that were started for a run in this folder: they inherit its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RANKGR_TEST_MARK") == str(folder):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@contextlib.contextmanager
def _started(folder: Path, arguments: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    output = folder / "output"
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=folder,
            env=environment() | {"RANKGR_TEST_MARK": str(folder)},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, output
    finally:
        process.kill()
        process.wait()


def test_ctrl_c_leaves_no_process_and_the_next_run_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    events, items = write_log(tmp_path)
    arguments = ["train", "--logs", str(events), "--items", str(items), "--preset", "tiny", *SETTINGS, *LONG]
    checkpoints = tmp_path / ".rankgr/steps/training"
    with _started(tmp_path, arguments) as (process, output):
        _wait_until(lambda: any(checkpoints.glob("*/checkpoints/checkpoint_manager_snapshot.json")), process, output)
        assert len(_of_this_run(tmp_path)) > 3
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, output.read_text()[-3000:]
    assert _of_this_run(tmp_path) == []
    assert "run the same command again" in output.read_text()
    resumed = rankgr(*arguments, folder=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert resumed.stderr.count("skipped: finished before") == 2
    assert "continued from its last checkpoint" in resumed.stderr
    done = [int(n) for n in re.findall(r"(\d+)/\d+ steps", resumed.stderr)]
    assert done[0] > 0
    assert done == sorted(done)


def test_a_terminated_quickstart_ends_the_step_that_is_running(tmp_path: Path) -> None:
    events, items = write_log(tmp_path)
    arguments = ["quickstart", "--logs", str(events), "--items", str(items), "--preset", "tiny", *SETTINGS, *LONG]
    with _started(tmp_path, arguments) as (process, output):
        _wait_until(lambda: "started" in output.read_text(), process, output)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130, output.read_text()[-3000:]
    assert _of_this_run(tmp_path) == []
