"""Earlier rows, mixed into incremental training against forgetting: a uniform sample of all that came by.

Reservoir sampling (Vitter's algorithm R, 1985): the n-th row takes a place of a full buffer with probability size / n.
What is drawn depends on the seed and on how many rows came, so that a restored buffer goes on as the saved one would have.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from components.retriever.packing import Row

_FILE = "replay.safetensors"


class ReplayBuffer:
    """Rows that came by, each with the same chance to be there.

    Args:
        size: rows that are kept.
        seed: of the run.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._rows: list[Row] = []
        self._seen = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Let rows come by."""
        for row in rows:
            self._seen += 1
            if len(self._rows) < self._size:
                self._rows.append(row)
            elif (place := int(np.random.default_rng((self._seed, self._seen)).integers(self._seen))) < self._size:
                self._rows[place] = row

    def sample(self, count: int, turn: int) -> list[Row]:
        """Different rows, at most `count` of them, drawn anew in each turn."""
        drawn = np.random.default_rng((self._seed, self._seen, turn)).permutation(len(self._rows))[:count]
        return [self._rows[index] for index in drawn]

    def save(self, folder: Path) -> None:
        """Write the buffer, without pickle."""
        arrays = {"seen": np.array([self._seen])}
        for name in (field.name for field in fields(Row)):
            columns = [np.asarray(getattr(row, name), np.int32) for row in self._rows]
            arrays[name] = np.concatenate([np.empty(0, np.int32), *columns])
            arrays[f"{name}.lengths"] = np.array([len(column) for column in columns], np.int32)
        save_file(arrays, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Inverse of `save`."""
        arrays = load_file(folder / _FILE)
        self._seen = int(arrays["seen"][0])
        names = [field.name for field in fields(Row)]
        columns = [np.split(arrays[name].astype(np.int64), np.cumsum(arrays[f"{name}.lengths"])[:-1]) for name in names]
        count = len(arrays[f"{names[0]}.lengths"])
        self._rows = [Row(*(column[index] for column in columns)) for index in range(count)]
