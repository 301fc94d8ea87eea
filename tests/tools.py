"""Programs that pip does not install; `make test-tools` gets them where it can."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

_BESIDE = Path(sys.prefix) / "tools" / "usr" / "bin"


def tool(*names: str) -> str:
    """Path of the first of these that is here; without one the test is skipped, but in continuous integration it fails."""
    found = next((path for name in names if (path := shutil.which(name) or shutil.which(name, path=_BESIDE))), None)
    if found is None:
        told = f"{' or '.join(names)} is not installed: make test-tools"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(told)
        pytest.skip(told)
    return found
