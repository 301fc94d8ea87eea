"""Numbered folders that count once their manifest is written; the newest whole one is where a trainer goes on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from infra import storage
from infra.errors import IntegrityError
from infra.logs import get_logger

Fill = Callable[[Path], None]
Read = Callable[[Path, Mapping[str, Any]], None]


class Checkpoints:
    """The checkpoints of a trainer, of which the last few are kept.

    Args:
        uri: local folder or s3:// URI.
        keep: how many.
    """

    def __init__(self, uri: str, keep: int) -> None:
        self._uri, self._keep = uri, keep

    def save(self, fill: Fill, metadata: Mapping[str, Any]) -> None:
        """Commit what `fill` writes into a folder, then drop the oldest ones."""
        uri = storage.join(self._uri, f"{max(map(int, self._names()), default=0) + 1:08d}")
        with tempfile.TemporaryDirectory() as folder:
            fill(Path(folder))
            for path in sorted(Path(folder).iterdir()):
                storage.write_bytes(storage.join(uri, path.name), path.read_bytes())
        storage.commit(uri, metadata)
        for name in self._names()[: -self._keep]:
            self._drop(name)

    def load(self, read: Read) -> bool:
        """Let `read` have the newest checkpoint that is whole; returns whether there is one."""
        for name in reversed(self._names()):
            uri = storage.join(self._uri, name)
            try:
                manifest = storage.open_committed(uri)
            except IntegrityError as error:
                if not storage.exists(storage.join(uri, storage.MANIFEST)):
                    self._drop(name)  # its writer was stopped
                else:
                    get_logger("stream").error("a checkpoint is damaged, the one before it is taken", where=error.where, what=error.what)
                continue
            with storage.local_copy(uri) as folder:
                read(folder, manifest.metadata)
            return True
        return False

    def _names(self) -> list[str]:
        """All folders, committed or not, the oldest first."""
        if not storage.exists(self._uri):
            return []
        return sorted({path.split("/")[0] for path in storage.list_files(self._uri)})

    def _drop(self, name: str) -> None:
        uri = storage.join(self._uri, name)
        storage.remove(storage.join(uri, storage.MANIFEST))  # first, so that what is half gone does not count
        storage.remove(uri)
