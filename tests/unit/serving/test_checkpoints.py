"""Only a whole checkpoint counts; the newest one is taken, or the one before it where that is damaged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from serving.checkpoints import Checkpoints


def save(checkpoints: Checkpoints, value: str) -> None:
    checkpoints.save(lambda folder: (folder / "value").write_text(value) and None, {"of": value})


def load(checkpoints: Checkpoints) -> str | None:
    found: list[str] = []

    def read(folder: Path, metadata: Mapping[str, Any]) -> None:
        assert metadata["of"] == (folder / "value").read_text()
        found.append(metadata["of"])

    assert checkpoints.load(read) == bool(found)
    return found[0] if found else None


def test_the_newest_is_loaded_and_the_last_few_are_kept(tmp_path: Path) -> None:
    ours = Checkpoints(str(tmp_path / "checkpoints"), 2)
    assert load(ours) is None
    for value in "abc":
        save(ours, value)
    assert load(ours) == "c"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000002", "00000003"]


def test_one_that_was_not_committed_does_not_count_and_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Checkpoints(str(tmp_path), 3)
    save(ours, "a")
    with monkeypatch.context() as killed:
        killed.setattr(storage, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(ours, "b")
    assert (tmp_path / "00000002").exists()
    assert load(ours) == "a"
    assert not (tmp_path / "00000002").exists()


def test_a_damaged_one_is_passed_over_and_never_overwritten(tmp_path: Path) -> None:
    ours = Checkpoints(str(tmp_path), 3)
    save(ours, "a")
    save(ours, "b")
    (tmp_path / "00000002" / "value").write_text("flipped")
    assert load(ours) == "a"
    save(ours, "c")
    assert load(ours) == "c"
    assert (tmp_path / "00000002" / "value").read_text() == "flipped"
