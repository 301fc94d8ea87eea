"""What the trainer knows of users before the stream, and that there is one of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from components.retriever.bundle import load_bundle
from components.training.data import training_rows
from infra import storage
from infra.config import load_config
from infra.errors import DataError, ServiceError
from infra.local import only_one
from infra.records import Level
from infra.tracking import Registered
from serving.streaming import indices_in, past_of, rows_of, timelines_of, train_on_stream
from tests.streaming import settings, write_small_bundle
from tests.unit.components.training.small import N_ITEMS, configuration, timelines


def test_the_timelines_are_those_that_the_champion_came_from(tmp_path: Path) -> None:
    bundle, sessions = load_bundle(write_small_bundle(tmp_path, settings())), str(tmp_path / "sessions")
    storage.write_table(timelines(), f"{sessions}/timelines/part-00000.parquet")
    storage.write_table(bundle.catalogue.slice(1), f"{sessions}/catalogue.parquet")
    found, known = timelines_of(Registered("1", "", "", {}, {"run_id": "a-run", "sessions": sessions}), bundle)
    assert found["user_id"].to_pylist() == timelines()["user_id"].to_pylist()
    assert known.tolist() == list(range(1, N_ITEMS))


def test_a_champion_of_unknown_origin_has_no_timelines(tmp_path: Path) -> None:
    found, known = timelines_of(Registered("1", "", "", {}, {}), load_bundle(write_small_bundle(tmp_path, settings())))
    assert (len(found), len(known)) == (0, 0)


def test_the_past_of_a_user_is_in_the_indices_of_the_bundle() -> None:
    known = indices_in(["i3", "i2", "new"], [f"i{i}" for i in range(N_ITEMS)])
    assert known.tolist() == [-1, -1, 1, 0, *[-1] * 8]
    past = past_of(timelines(), known)
    # u2 clicked 2, 3, ... 8, each beside what lies opposite (8, 9, ... 2); of these the bundle knows 2 and 3.
    assert past("u2").items.tolist() == [1, 0, 1]
    assert past("u2").levels.tolist() == [Level.CLICK, Level.CLICK, Level.EXPOSURE]
    assert len(past("nobody").items) == 0


def test_the_replay_buffer_begins_with_the_rows_of_the_run_where_its_items_are_the_bundles() -> None:
    same, other = np.arange(N_ITEMS), np.arange(N_ITEMS)[::-1]
    assert len(list(rows_of(timelines(), same, configuration()))) == len(training_rows(timelines(), configuration()))
    assert list(rows_of(timelines(), other, configuration())) == []


def test_one_trainer_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(ServiceError, match="another trainer is running")
    with only_one(str(tmp_path), "trainer"), refused, only_one(str(tmp_path), "trainer"):
        pass
    with only_one(str(tmp_path), "trainer"), only_one("s3://somewhere", "trainer"):
        pass


def test_without_a_champion_there_is_nothing_to_train(tmp_path: Path, valkey: str) -> None:
    config = load_config(preset="tiny", overrides=[f"workspace={tmp_path}"])
    with pytest.raises(DataError, match="no champion"):
        train_on_stream(config, valkey)
