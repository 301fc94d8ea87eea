"""One finished quickstart on a log of the user's own, shared by the tests of what it leaves behind."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command import rankgr
from tests.logs import COLUMNS, write_log


@dataclass(frozen=True)
class Finished:
    """A folder in which `rankgr quickstart` has run."""

    folder: Path
    arguments: tuple[str, ...]
    first: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("quickstart")
    events, items = write_log(folder, bad_rows=3)
    mapped = (*COLUMNS, "--set", "data.columns.item_id=sku")
    arguments = ("quickstart", "--logs", str(events), "--items", str(items), "--preset", "tiny", *mapped)
    return Finished(folder, arguments, rankgr(*arguments, folder=folder))
