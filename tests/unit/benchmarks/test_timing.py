"""What the benchmarks print is kept where that is asked for."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from tests.benchmarks.timing import finish, table


def test_a_full_run_keeps_its_tables_and_its_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table("seconds", ["side", "time"], [["ours", "1.0 ms"]])
    finish({"bench": "trie", "vs_callback": 104.25678}, Namespace(write=True, device="cuda"), folder=tmp_path)
    kept = (tmp_path / "trie-cuda.md").read_text()
    assert "1.0 ms" in kept
    assert '{"bench": "trie", "vs_callback": 104.257}' in kept
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bench"] == "trie"


def test_nothing_is_kept_unasked(tmp_path: Path) -> None:
    finish({"bench": "trie"}, Namespace(write=False), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
