"""A finished step is not redone, an interrupted one is; what changed decides."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra import steps, storage
from infra.config import load_config
from infra.errors import DataError, IntegrityError
from infra.steps import Run, StepResult, code_version, content_of, job_main, raise_kept_error, run_records, run_step

STEP = "step"
ROOT = Path(__file__).resolve().parents[3]
Work = Callable[[str], dict[str, Any]]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    return tmp_path / "ws"


@pytest.fixture
def run(workspace: Path) -> Run:
    return Run(load_config(overrides=[f"workspace={workspace}"]), "r1")


class Counting:
    """Work that writes a file and counts how often it is done."""

    def __init__(self) -> None:
        self.done = 0

    def __call__(self, uri: str) -> dict[str, Any]:
        self.done += 1
        storage.write_json(storage.join(uri, "out.json"), self.done)
        return {"rows": 3}


def do(run: Run, work: Work, *, name: str = "step", seed: int = 0, source: str = "x", resumable: bool = False) -> StepResult:
    return run_step(run, name, work, settings={"seed": seed}, inputs={"source": source}, code=("infra/errors.py",), resumable=resumable)


def test_a_finished_step_is_skipped_and_says_what_it_found(run: Run) -> None:
    work = Counting()
    first, second = do(run, work), do(run, work)
    assert work.done == 1
    assert (first.skipped, second.skipped) == (False, True)
    assert second.uri == first.uri
    assert second.metadata == first.metadata
    assert second.metadata["rows"] == 3
    assert second.seconds == first.seconds


def test_fresh_does_it_again_in_a_clean_folder(run: Run) -> None:
    work = Counting()
    first = do(run, work)
    storage.write_bytes(storage.join(first.uri, "left over"), b"")
    again = do(Run(run.config, "r2", fresh=True), work)
    assert (work.done, again.skipped, again.uri) == (2, False, first.uri)
    assert storage.list_files(again.uri) == ["manifest.json", "out.json"]


def test_another_input_or_setting_is_another_step(run: Run) -> None:
    work = Counting()
    uris = {do(run, work).uri, do(run, work, source="y").uri, do(run, work, seed=1).uri}
    assert len(uris) == work.done == 3


def test_another_code_is_another_step(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "checkout" / "components" / "room"
    room.mkdir(parents=True)
    (room / "job.py").write_text("one")
    (room / "notes.md").write_text("one")
    monkeypatch.setattr(steps, "_ROOT", tmp_path / "checkout")
    versions = [code_version(["components/room"])]
    (room / "notes.md").write_text("two")
    versions.append(code_version(["components/room"]))
    (room / "job.py").write_text("two")
    versions.append(code_version(["components/room"]))
    assert versions[0] == versions[1]
    assert versions[1] != versions[2]
    assert code_version(["components/room/job.py"]) == versions[2]


def test_interrupted_work_is_not_committed_and_done_again_from_the_start(run: Run) -> None:
    folders: list[str] = []

    def interrupted(uri: str) -> dict[str, Any]:
        folders.append(uri)
        storage.write_bytes(storage.join(uri, "half"), b"")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        do(run, interrupted)
    with pytest.raises(IntegrityError, match="never committed"):
        content_of(folders[0])
    assert run_records(run.config.workspace, "r1") == {}
    result = do(run, Counting())
    assert (result.skipped, result.uri) == (False, folders[0])
    assert storage.list_files(result.uri) == ["manifest.json", "out.json"]


def test_resumable_work_finds_what_it_left(run: Run) -> None:
    def interrupted(uri: str) -> dict[str, Any]:
        storage.write_bytes(storage.join(uri, "checkpoint"), b"epoch 3")
        raise DataError("broken")

    seen: list[bytes] = []

    def resumed(uri: str) -> dict[str, Any]:
        seen.append(storage.read_bytes(storage.join(uri, "checkpoint")))
        return {}

    with pytest.raises(DataError):
        do(run, interrupted, resumable=True)
    assert not do(run, resumed, resumable=True).skipped
    assert seen == [b"epoch 3"]


def test_fresh_forgets_what_resumable_work_left(run: Run) -> None:
    def left(uri: str) -> dict[str, Any]:
        storage.write_bytes(storage.join(uri, "checkpoint"), b"")
        raise DataError("broken")

    with pytest.raises(DataError):
        do(run, left, resumable=True)
    result = do(Run(run.config, "r2", fresh=True), Counting(), resumable=True)
    assert storage.list_files(result.uri) == ["manifest.json", "out.json"]


def test_contents_identify_a_step_for_the_next_one(run: Run) -> None:
    result = do(run, Counting())
    before = content_of(result.uri)
    assert before == content_of(result.uri)
    storage.write_bytes(storage.join(result.uri, "out.json"), b"changed")
    with pytest.raises(IntegrityError, match="sha256"):
        content_of(result.uri)


def test_records_of_a_run_come_in_the_order_of_its_steps(run: Run) -> None:
    for name in ("sessions", "codes", "training", "evaluation", "alignment"):
        do(run, Counting(), name=name)
    records = run_records(run.config.workspace, "r1")
    assert list(records) == ["sessions", "codes", "training", "evaluation", "alignment"]
    assert records["codes"].metadata["rows"] == 3
    assert run_records(run.config.workspace, "other") == {}


def test_a_skipped_step_is_on_record_in_its_new_run(run: Run) -> None:
    do(run, Counting())
    do(Run(run.config, "r2"), Counting())
    assert run_records(run.config.workspace, "r2")["step"].skipped


def call_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[tuple[Run, str]]:
    calls: list[tuple[Run, str]] = []

    def step(run: Run, source: str) -> StepResult:
        calls.append((run, source))
        return StepResult("step", "/where/it/lies", False, 0.1)

    monkeypatch.setattr(sys, "argv", ["job", *arguments])
    job_main(step, ("source",))
    return calls


def test_a_job_takes_its_inputs_and_settings_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [(run, source)] = call_main(monkeypatch, "--source", "s3://in", "--set", "seed=5", "--run-id", "r7", "--fresh")
    assert (source, run.config.seed, run.run_id, run.fresh) == ("s3://in", 5, "r7", True)
    assert capsys.readouterr().out == "/where/it/lies\n"


def test_parameters_of_a_step_that_are_true_or_false_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def step(run: Run, *, strict: bool = True) -> StepResult:
        calls.append(strict)
        return StepResult("step", "/where/it/lies", False, 0.1)

    for arguments in ([], ["--no-strict"]):
        monkeypatch.setattr(sys, "argv", ["job", *arguments])
        job_main(step, ())
    assert calls == [True, False]


def test_the_error_of_a_job_is_left_for_who_submitted_it(monkeypatch: pytest.MonkeyPatch, workspace: Path) -> None:
    def step(run: Run) -> StepResult:
        raise DataError("broken", where="log.csv", mend="repair it")

    monkeypatch.setattr(sys, "argv", ["job", "--set", f"workspace={workspace}", "--run-id", "r7"])
    with pytest.raises(SystemExit):
        job_main(step, ())
    with pytest.raises(DataError, match="broken"):
        raise_kept_error(str(workspace), "r7", "step")


def test_a_job_without_its_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        call_main(monkeypatch)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("settings", "code", "messages"),
    [
        (["data.logs=/nowhere/log.parquet"], 3, ["error: the path does not exist", "where: /nowhere/log.parquet", "mend:"]),
        ([], 3, ["error: no logs were given", "--logs"]),
        (["data.lgs=x"], 2, ["error: unknown setting 'data.lgs'; did you mean 'data.logs'?"]),
    ],
)
def test_a_job_ends_with_the_exit_code_of_its_error_and_no_traceback(
    tmp_path: Path, settings: list[str], code: int, messages: list[str]
) -> None:
    options = [part for setting in (f"workspace={tmp_path}", *settings) for part in ("--set", setting)]
    command = [sys.executable, "-m", "components.sessions.job", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == code
    assert all(message in done.stderr for message in messages)
    assert "Traceback" not in done.stderr
