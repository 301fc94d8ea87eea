"""A small committed sessions folder to codebooks and a SID table, without Ray."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.semantic_ids import job, shards
from components.semantic_ids.coder import FILES, Coder
from components.semantic_ids.job import build_semantic_ids, check_limits, items_per_sid, read_codebooks, step, training_items
from components.semantic_ids.shards import ROWS
from infra import records as r
from infra import storage
from infra.config import Config, load_config
from infra.errors import DataError, IntegrityError
from infra.steps import Run, StepResult
from tests.unit.components.semantic_ids.catalogues import items

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


@pytest.mark.parametrize("quantizer", ["rq_kmeans", "balanced_rq_kmeans", "rq_vae"])
def test_every_quantizer_gives_unique_sids_and_can_be_read_again(tmp_path: Path, sessions: str, quantizer: str) -> None:
    settings = config(tmp_path, f"semantic_ids.quantizer={quantizer}", "semantic_ids.rq_vae.epochs=3")
    build_semantic_ids(settings, sessions, str(tmp_path / "out"))
    assert len({tuple(code) for code in codes_of(tmp_path / "out")}) == N_ITEMS
    coder = Coder.read(str(tmp_path / "out"), settings.semantic_ids)
    vectors, codes = coder.encode(items(["space war", ""]))
    assert codes.shape == (2, 2)
    assert np.isfinite(vectors).all()


def test_balanced_levels_use_every_codeword(tmp_path: Path, sessions: str) -> None:
    figures = build_semantic_ids(config(tmp_path, "semantic_ids.quantizer=balanced_rq_kmeans"), sessions, str(tmp_path / "out"))
    assert figures["utilisation"] == [1.0, 1.0]


def test_the_report_shows_titles_that_share_a_prefix(tmp_path: Path, sessions: str) -> None:
    build_semantic_ids(config(tmp_path), sessions, str(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Title 11" in page
    assert "collision rate" in page


def test_a_new_fit_tells_what_it_changed_of_an_earlier_one(tmp_path: Path, sessions: str) -> None:
    first = step(Run(config(tmp_path / "ws")), sessions)
    again = step(Run(config(tmp_path / "ws", f"semantic_ids.earlier={first.uri}", "seed=5")), sessions)
    changed = sum(a != b for a, b in zip(codes_of(first.uri), codes_of(again.uri), strict=True))
    assert again.metadata["churn"] == changed / N_ITEMS


def test_too_many_collisions_stop_the_run_and_name_the_report(tmp_path: Path, sessions: str) -> None:
    shared = ["semantic_ids.collisions=shared", "semantic_ids.codes=2", "semantic_ids.text_dim=2", "semantic_ids.quantizer=rq_kmeans"]
    with pytest.raises(DataError, match=r"collision rate [01]\.\d{4} is above max_collision_rate 0\.1") as caught:
        step(Run(config(tmp_path / "ws", *shared, "semantic_ids.max_collision_rate=0.1")), sessions)
    assert Path(caught.value.where).exists()
    assert not step(Run(config(tmp_path / "ws", *shared)), sessions).skipped  # the page tells the limits


def test_a_level_that_uses_too_little_stops_the_run(tmp_path: Path, sessions: str) -> None:
    result = StepResult(
        "semantic_ids", "somewhere", False, 0.0, {"collision_rate_before": 0.0, "utilisation": [1.0, 0.5], "utilisation_before": [1.0, 0.8]}
    )
    check_limits(result, config(tmp_path, "semantic_ids.min_utilisation=0.5").semantic_ids)
    with pytest.raises(DataError, match=r"utilisation 0\.5000 is below min_utilisation 0\.9"):
        check_limits(result, config(tmp_path, "semantic_ids.min_utilisation=0.9").semantic_ids)


def test_a_figure_that_is_no_number_fails_the_limits(tmp_path: Path) -> None:
    result = StepResult(
        "semantic_ids", "somewhere", False, 0.0, {"collision_rate_before": float("nan"), "utilisation": [1.0], "utilisation_before": [1.0]}
    )
    with pytest.raises(DataError, match="collision rate nan is above"):
        check_limits(result, config(tmp_path).semantic_ids)


def test_actors_build_the_table_of_one_process(tmp_path: Path, sessions: str, ray_cluster: str) -> None:
    build_semantic_ids(config(tmp_path), sessions, str(tmp_path / "one"))
    build_semantic_ids(config(tmp_path, "semantic_ids.workers=2"), sessions, str(tmp_path / "many"))
    assert codes_of(tmp_path / "many") == codes_of(tmp_path / "one")
    assert not (tmp_path / "many" / "blocks").exists()


def test_a_large_catalogue_is_never_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, width = 12 * ROWS, 256
    folder = large_sessions(tmp_path / "sessions", rows, width)
    monkeypatch.setattr(shards, "KEPT_BYTES", 0)
    codes = ["semantic_ids.levels=4", "semantic_ids.codes=24", "semantic_ids.iterations=1", "semantic_ids.quantizer=rq_kmeans"]
    beams = ["decoding.beams=[4,4,4,4]", "decoding.lambdas=[4,4,4,4]", "training.loss.train_lambdas=[4,4,4,4]"]
    tracemalloc.start()
    try:
        figures = build_semantic_ids(config(tmp_path, *codes, *beams), folder, str(tmp_path / "out"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert figures["items"] == rows
    assert peak < rows * width * 4 / 2


def large_sessions(folder: Path, rows: int, width: int) -> str:
    """Items with nothing but an embedding, and one short timeline of a single item."""
    values = np.random.default_rng(0).standard_normal(rows * width, np.float32)
    ends = pa.array(np.arange(rows + 1) * width, pa.int32())
    blank, numbers = pa.array([""] * rows), pa.array(np.arange(rows))
    columns = {
        **dict.fromkeys(r.CATALOGUE.names, blank),
        r.ITEM_INDEX: numbers.cast(pa.int32()),
        r.ITEM_ID: numbers.cast(pa.string()),
        r.EMBEDDING: pa.ListArray.from_arrays(ends, pa.array(values)),
        r.POPULARITY: numbers,
        r.SEGMENTS: pa.nulls(rows, r.CATALOGUE.field(r.SEGMENTS).type),
    }
    storage.write_table(pa.table(columns, schema=r.CATALOGUE), str(folder / "catalogue.parquet"))
    timeline = {"user_id": "u", "items": [0], "levels": [3], "timestamps": [0], "requests": [0], "phases": [r.Phase.TEST]}
    storage.write_table(pa.Table.from_pylist([timeline], schema=r.TIMELINES), str(folder / "timelines" / "part-00000.parquet"))
    return str(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_leaves_no_files_of_features(
    tmp_path: Path, sessions: str, ray_cluster: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        assert list((tmp_path / "out").glob("scratch-*/*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "sid_statistics", fail)
    with pytest.raises(KeyboardInterrupt):
        build_semantic_ids(config(tmp_path, f"semantic_ids.workers={workers}"), sessions, str(tmp_path / "out"))
    assert list((tmp_path / "out").rglob("*")) == []


def test_nothing_but_the_results_is_left(tmp_path: Path, sessions: str) -> None:
    build_semantic_ids(config(tmp_path), sessions, str(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == sorted(
        [*FILES, "report.html", "section.html", "sids.parquet", "stats.json"]
    )


def test_items_without_a_feature_are_named(tmp_path: Path, sessions: str, capsys: pytest.CaptureFixture[str]) -> None:
    build_semantic_ids(config(tmp_path, "semantic_ids.collaborative_weight=0"), sessions, str(tmp_path / "out"))
    assert "such_as=['i00']" in capsys.readouterr().err
    assert storage.read_json(str(tmp_path / "out" / "stats.json"))["without_features"] == 1
