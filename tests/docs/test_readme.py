"""The README's commands work as printed: each is run, heavy ones as a dry run in a finished workspace."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from tests.command import ROOT, Finished, environment, rankgr, rankgr_here

README = (ROOT / "README.md").read_text()
READS_ONLY = {"report", "recommend", "doctor", "config"}


def commands(program: str) -> Iterator[str]:
    """Lines of the README's shell blocks that call a program."""
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL):
        for line in block.splitlines():
            command = line.split(" #")[0].strip()
            if command.startswith(f"{program} "):
                yield command


def test_the_readme_names_the_two_commands_that_do_all_set_up() -> None:
    assert {"make quickstart", "make test"} <= set(commands("make"))


@pytest.mark.parametrize("command", sorted(set(commands("make"))))
def test_every_make_target_exists(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", sorted(set(commands("rankgr"))))
def test_every_rankgr_command_runs(command: str, finished: Finished) -> None:
    arguments = shlex.split(command)[1:]
    log = finished.folder / "events.csv"
    arguments = [
        str(log) if a.startswith("events.") else str(log.with_name("items.csv")) if a.startswith(("items.", "new_items.")) else a
        for a in arguments
    ]
    if arguments[0] not in READS_ONLY:
        arguments.append("--dry-run")
    if {"--logs", "--items"} & set(arguments):  # the README's column names are an example
        arguments += ["--set", "data.columns.user_id=uid", "--set", "data.columns.item_id=sku"]
        arguments += ["--set", "data.columns.timestamp=at", "--set", "data.columns.level=stage", "--set", "data.level_rules={}"]
        arguments += ["--set", "data.columns.request_id=null", "--set", "data.columns.signals={}"]
    arguments = ["u1" if a == "42" else a for a in arguments]
    run = rankgr if arguments[0] == "doctor" else rankgr_here  # which would count this session's services among its own
    done = run(*arguments, folder=finished.folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", sorted(set(commands("python"))))
def test_every_benchmark_takes_the_options_that_are_shown(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, module, *options = shlex.split(command)
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in options if option.startswith("--"))


def help_of(*words: str) -> str:
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [*words, "--help"], catch_exceptions=False).stdout


def test_every_command_has_help_with_an_example() -> None:
    names = re.findall(r"^│ ([a-z]+) ", help_of(), flags=re.MULTILINE)
    assert {"quickstart", "doctor", "run", "train", "evaluate", "precompute", "serve", "recommend", "report"} <= set(names)
    groups = {"data get", "data describe", "config show", "sids add", "sids plan", "release list", "release rollback"}
    for name in sorted((set(names) - {"data", "config", "release"}) | groups):
        help_text = help_of(*name.split())
        assert "Example" in help_text
        for option in ("--config", "--set", "--dry-run") if name != "compile" else ("--dry-run",):
            assert option in help_text
