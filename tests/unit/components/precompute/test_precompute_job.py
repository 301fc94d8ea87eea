"""Timelines become slates; readers see a version only when all of it is there. Real Ray Data, real Valkey."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.precompute.job import history_of, precompute
from infra.config import Config, load_config
from infra.errors import DataError, IntegrityError, ServiceError
from infra.local import free_port
from infra.slate_store import SlateStore, UserHistory
from tests.fakes import fake_loader, item_id, write_bundle, write_timelines

USERS = 100


@pytest.fixture
def config() -> Config:
    return load_config(
        overrides=["decoding.slate_size=5", "decoding.users_per_batch=8", "serving.precompute_actors=1", "retriever.history_min_level=2"]
    )


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def timelines(tmp_path: Path) -> str:
    return write_timelines(tmp_path / "timelines", USERS)


def test_events_below_the_level_are_no_history() -> None:
    history = history_of([7, 8, 9], [1, 3, 2], 2)
    assert history.items.tolist() == [8, 9]
    assert history.levels.tolist() == [3, 2]
    assert len(history_of([], [], 1).items) == 0


@pytest.mark.usefixtures("ray_cluster")
def test_every_user_gets_a_slate_and_the_version_becomes_active(config: Config, bundle: str, timelines: str, valkey: str) -> None:
    for _again in range(2):  # the second run overwrites the first
        result = precompute(config, bundle, timelines, valkey, "v1", loader=fake_loader("v1"))
        assert (result["version"], result["users"], result["slate_size"]) == ("v1", USERS, 5)
        with SlateStore(valkey) as store:
            assert store.active_version() == "v1"
            assert store.users("v1") == store.count("v1") == USERS
            slate = store.get("user-3")
            assert slate is not None
            # History without the event of level 1: items 4 and 5. All phases count.
            assert slate.item_ids == tuple(item_id(i) for i in (6, 7, 8, 9, 10))
            assert store.history("user-3") == UserHistory("user-3", (item_id(4), item_id(5)), (2, 3), until=3)
            fallback = store.fallback()
            assert fallback is not None
            assert fallback.item_ids == tuple(item_id(i) for i in (29, 28, 27, 26, 25))


@pytest.mark.usefixtures("ray_cluster")
def test_readers_keep_the_old_version_when_the_new_one_is_interrupted(config: Config, bundle: str, timelines: str, valkey: str) -> None:
    precompute(config, bundle, timelines, valkey, "v1", loader=fake_loader("v1"))
    with pytest.raises(Exception, match="the model broke"):
        precompute(config, bundle, timelines, valkey, "v2", loader=fake_loader("v2", fail_on="20"))
    with SlateStore(valkey) as store:
        assert store.active_version() == "v1"
        slate = store.get("user-3")
        assert slate is not None
        assert slate.model_version == "v1"
        with pytest.raises(IntegrityError):
            store.activate("v2")

    precompute(config, bundle, timelines, valkey, "v2", loader=fake_loader("v2"))
    with SlateStore(valkey) as store:
        assert store.active_version() == "v2"
        assert store.versions() == ["v2", "v1"]


@pytest.mark.usefixtures("ray_cluster")
def test_a_bundle_of_another_version_is_refused(config: Config, bundle: str, timelines: str, valkey: str) -> None:
    with pytest.raises(IntegrityError, match="has version v1, not v2"):
        precompute(config, bundle, timelines, valkey, "v2", loader=fake_loader("v1"))


def test_what_is_missing_is_named(config: Config, bundle: str, timelines: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no timelines"):
        precompute(config, bundle, str(tmp_path / "empty"), "redis://127.0.0.1:1", "v1", loader=fake_loader("v1"))
    with pytest.raises(ServiceError, match="Redis"):
        precompute(config, bundle, timelines, f"redis://127.0.0.1:{free_port()}", "v1", loader=fake_loader("v1"))
