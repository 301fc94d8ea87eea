"""The `rankgr` command as a user runs it: a process of its own, with services of its own; or its work alone, in this process."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

COMMAND = [sys.executable, "-c", "from pipelines.cli import main; main()"]
ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    """The environment without the services that the test session runs for itself."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RANKGR_"))}
    return own | {"PYTHONPATH": str(ROOT), "COLUMNS": "160", "PYTHONUNBUFFERED": "1"}


def rankgr(*arguments: str, folder: Path, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """Run the command to its end in a folder."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def rankgr_here(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, where torch is imported already: for commands that start no services."""
    from pipelines.cli import main

    out, err, code = io.StringIO(), io.StringIO(), None
    with (
        contextlib.chdir(folder),
        mock.patch.dict(os.environ, environment(), clear=True),
        mock.patch.object(sys, "argv", ["rankgr", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(arguments, code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Finished:
    """A folder in which `rankgr quickstart` has run."""

    folder: Path
    arguments: tuple[str, ...]
    first: subprocess.CompletedProcess[str]
