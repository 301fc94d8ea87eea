"""The way back to an earlier version, in a real MLflow database and a real Valkey."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from components.release.versions import releases, roll_back
from infra import storage
from infra.errors import DataError, IntegrityError, ServiceError
from infra.service_sections import TrackingConfig
from infra.slate_store import Slate, SlateStore
from infra.tracking import Registry


@pytest.fixture
def store(valkey: str) -> Iterator[SlateStore]:
    with SlateStore(valkey) as store:
        yield store


@pytest.fixture
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(TrackingConfig(), str(tmp_path_factory.mktemp("registry")))


def release(registry: Registry, store: SlateStore, folder: Path, *, promote: bool = True) -> str:
    """Register a bundle; if it is promoted its slates are published too. Returns its version."""
    storage.write_bytes(str(folder / "model.safetensors"), folder.name.encode())
    version = storage.commit(str(folder), {}).digest[:12]
    number = registry.register(str(folder), evaluation="e", metrics={}, params={}, files={})
    if promote:
        registry.promote(number)
        store.complete(version, users=store.publish(version, [Slate("ann", (folder.name,), (1.0,), version, 1)]))
        store.activate(version)
    return version


def test_releases_say_what_is_champion_and_what_is_seen(registry: Registry, store: SlateStore, tmp_path: Path) -> None:
    one, two, refused = (release(registry, store, tmp_path / n, promote=n != "refused") for n in ("one", "two", "refused"))
    found = releases(registry, store)
    assert [(r.version, r.is_champion, r.is_active, r.users) for r in found] == [
        (refused, False, False, None), (two, True, True, 1), (one, False, False, 1),
    ]  # fmt: skip
    assert found[0].promoted_ms == 0 < found[2].promoted_ms <= found[1].promoted_ms


def test_what_was_rolled_back_from_is_not_returned_to(registry: Registry, store: SlateStore, tmp_path: Path) -> None:
    release(registry, store, tmp_path / "one")
    two, bad = (release(registry, store, tmp_path / name) for name in ("two", "bad"))
    assert roll_back(registry, store).version == two
    release(registry, store, tmp_path / "four")
    assert roll_back(registry, store).version == two != bad


def test_back_to_the_champion_before_and_on_to_any(registry: Registry, store: SlateStore, tmp_path: Path) -> None:
    names = ("one", "two", "refused", "three")
    one, two, _, three = (release(registry, store, tmp_path / n, promote=n != "refused") for n in names)
    for expected in (two, one):
        assert roll_back(registry, store).version == expected
        champion, slate = registry.champion(), store.get("ann")
        assert champion is not None and champion.bundle_uri == str(tmp_path / ("two" if expected == two else "one"))
        assert slate is not None and slate.model_version == store.active_version() == expected
    with pytest.raises(DataError, match="no earlier version"):
        roll_back(registry, store)
    assert roll_back(registry, store, "4").version == three
    assert roll_back(registry, store, two).version == two


def test_nothing_moves_unless_everything_can(registry: Registry, store: SlateStore, tmp_path: Path) -> None:
    one, two, refused = (release(registry, store, tmp_path / n, promote=n != "refused") for n in ("one", "two", "refused"))
    (tmp_path / "one" / "model.safetensors").write_bytes(b"flipped")
    with pytest.raises(IntegrityError):
        roll_back(registry, store, one)
    with pytest.raises(DataError, match="not in the store"):
        roll_back(registry, store, refused)
    with pytest.raises(DataError, match="no version nonsense"):
        roll_back(registry, store, "nonsense")
    champion = registry.champion()
    assert champion is not None and champion.number == "2"
    assert store.active_version() == two


def test_an_interrupted_way_back_is_finished_by_the_same_command(
    registry: Registry, store: SlateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, two, three = (release(registry, store, tmp_path / n) for n in ("one", "two", "three"))

    def gone(_: str) -> None:
        raise ServiceError("Redis does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(store, "activate", gone)
        with pytest.raises(ServiceError):
            roll_back(registry, store)
    assert store.active_version() == three  # and the registry names the second: nobody brings the third back
    assert roll_back(registry, store).version == two
    assert store.active_version() == two
