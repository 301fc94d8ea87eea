"""A small committed sessions folder to codebooks and a SID table, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.semantic_ids.job import build_semantic_ids, items_per_sid, read_codebooks, step, training_items
from components.semantic_ids.quantize import encode
from infra import records as r
from infra import storage
from infra.config import Config, load_config
from infra.errors import DataError, IntegrityError
from infra.steps import Run

N_ITEMS = 12
WORDS = ["space war", "love story", "cook book"]


def config(workspace: Path, *overrides: str) -> Config:
    sizes = ["semantic_ids.codes=4", "semantic_ids.text_dim=4", "semantic_ids.collaborative_dim=4"]
    return load_config(overrides=[f"workspace={workspace}", *sizes, *overrides])


def write_sessions(folder: Path) -> str:
    items = [
        {
            "item_index": number,
            "item_id": f"i{number:02}",
            "title": f"Title {number}",
            "text": f"{WORDS[number % 3]} {number}x" if number else "",
            "category": "",
            "brand": "",
            "embedding": None,
            "popularity": number,
        }
        for number in range(N_ITEMS)
    ]
    timelines = [
        {
            "user_id": f"u{user}",
            "items": [(user + 3 * place) % N_ITEMS for place in range(4)],
            "levels": [3] * 4,
            "timestamps": list(range(4)),
            "requests": list(range(4)),
            "phases": [r.Phase.TRAIN, r.Phase.TRAIN, r.Phase.VALID, r.Phase.TEST],
        }
        for user in range(6)
    ]
    storage.write_table(pa.Table.from_pylist(items, schema=r.CATALOGUE), str(folder / "catalogue.parquet"))
    storage.write_table(pa.Table.from_pylist(timelines, schema=r.TIMELINES), str(folder / "timelines" / "part-00000.parquet"))
    storage.commit(str(folder))
    return str(folder)


@pytest.fixture
def sessions(tmp_path: Path) -> str:
    return write_sessions(tmp_path / "sessions")


def codes_of(uri: str | Path) -> list[list[int]]:
    return storage.read_table(storage.join(str(uri), "sids.parquet"))["codes"].to_pylist()


def test_unique_sids_for_every_item_of_the_catalogue(tmp_path: Path, sessions: str) -> None:
    figures = build_semantic_ids(config(tmp_path), sessions, str(tmp_path / "out"))
    table = storage.read_table(str(tmp_path / "out" / "sids.parquet"))
    assert table.schema == r.SIDS
    assert table["item_id"].to_pylist() == [f"i{number:02}" for number in range(N_ITEMS)]
    assert table["popularity"].to_pylist() == list(range(N_ITEMS))
    codes = codes_of(tmp_path / "out")
    assert len({tuple(code) for code in codes}) == N_ITEMS == figures["items"]
    assert all(len(code) == 2 and 0 <= min(code) <= max(code) < 4 for code in codes)
    assert figures["collision_rate"] == 0.0
    assert storage.read_json(str(tmp_path / "out" / "stats.json"))["largest_bucket"] == 1


def test_codebooks_come_back_as_they_were_written(tmp_path: Path, sessions: str) -> None:
    settings = config(
        tmp_path, "semantic_ids.levels=3", "decoding.beams=[4,4,4]", "decoding.lambdas=[4,4,4]", "training.loss.train_lambdas=[4,4,4]"
    )
    build_semantic_ids(settings, sessions, str(tmp_path / "out"))
    codebooks = read_codebooks(str(tmp_path / "out"))
    assert codebooks.shape[:2] == (3, 4)
    assert codebooks.dtype == np.float32
    sums = codebooks[0][[1]] + codebooks[1][[2]]
    assert encode(sums, codebooks).shape == (1, 3)


def test_shared_sids_respect_their_capacity(tmp_path: Path, sessions: str) -> None:
    settings = config(tmp_path, "semantic_ids.collisions=shared", "semantic_ids.max_items_per_sid=2", "semantic_ids.codes=3")
    figures = build_semantic_ids(settings, sessions, str(tmp_path / "out"))
    assert figures["largest_bucket"] <= 2


def test_equal_seeds_give_equal_tables(tmp_path: Path, sessions: str) -> None:
    for name in ("one", "two"):
        build_semantic_ids(config(tmp_path, "seed=3"), sessions, str(tmp_path / name))
    assert codes_of(tmp_path / "one") == codes_of(tmp_path / "two")


def test_a_code_space_too_small_is_refused_before_anything_is_computed(tmp_path: Path, sessions: str) -> None:
    with pytest.raises(DataError, match=r"3\^2 codes x 1 items a code hold 9 items, the catalogue has 12"):
        build_semantic_ids(config(tmp_path, "semantic_ids.codes=3"), sessions, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_sids_know_the_training_phase_alone() -> None:
    timelines: list[dict[str, Any]] = [
        {"items": [4, 5, 6], "phases": [r.Phase.TRAIN, r.Phase.TRAIN, r.Phase.TEST]},
        {"items": [7, 8], "phases": [r.Phase.TRAIN, r.Phase.TEST]},
    ]
    assert [items.tolist() for items in training_items(pa.Table.from_pylist(timelines))] == [[4, 5]]


def test_capacity_follows_the_collision_mode(tmp_path: Path) -> None:
    assert items_per_sid(config(tmp_path).semantic_ids) == 1
    assert items_per_sid(config(tmp_path, "semantic_ids.collisions=shared").semantic_ids) == 5


def test_the_step_is_done_once_and_again_when_its_settings_change(tmp_path: Path, sessions: str) -> None:
    first = step(Run(config(tmp_path / "ws")), sessions)
    assert not first.skipped
    assert step(Run(config(tmp_path / "ws")), sessions).skipped
    assert step(Run(config(tmp_path / "ws", "training.epochs=7")), sessions).skipped
    assert not step(Run(config(tmp_path / "ws", "seed=1")), sessions).skipped


def test_damaged_sessions_are_refused(tmp_path: Path, sessions: str) -> None:
    (Path(sessions) / "catalogue.parquet").write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match="does not match its sha256"):
        step(Run(config(tmp_path / "ws")), sessions)
