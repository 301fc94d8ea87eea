"""Where the public data sets of the benchmarks lie; none is part of the project."""

from __future__ import annotations

import os
from pathlib import Path


def data_folder(name: str) -> Path:
    """Where a data set lies: below RANKGR_DATA, by default `../shared/data` beside the checkout.

    Raises:
        FileNotFoundError: it is not there.
    """
    root = Path(os.environ.get("RANKGR_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not (root / name).is_dir():
        raise FileNotFoundError(f"{root / name} does not exist: set RANKGR_DATA to the folder that holds {name}")
    return root / name
