"""Weights are swapped under requests: load aside, flip, refuse what is damaged; the loop that follows the registry. A real Valkey."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra import storage
from infra.config import load_config
from infra.errors import IntegrityError, ServiceError
from infra.slate_store import Slate, SlateStore
from serving import precompute
from serving.flights import Outcome, SlateRequest
from serving.precompute import Precompute
from serving.sync import Sync, in_step
from tests.fakes import fake_loader, item_id, write_bundle

CONFIG = load_config(overrides=["decoding.slate_size=3", "decoding.users_per_batch=8"])


def load(uri: str) -> Any:
    """`bundles/v7` has version v7."""
    if "damaged" in uri:
        raise IntegrityError("a hash does not match", where=uri)
    return fake_loader(uri.rpartition("/")[2])(uri)


def ask(user: str, version: str, *, late: bool = False) -> SlateRequest:
    return SlateRequest(user, version, time.time() + (-1 if late else 60))


def make_active(url: str, *versions: str) -> None:
    with SlateStore(url) as store:
        for version in versions:
            store.complete(version, users=0)
            store.activate(version)


def test_each_slate_is_of_the_weights_that_its_version_names(valkey: str) -> None:
    make_active(valkey, "v1", "v2")

    async def story() -> None:
        replica = Precompute(CONFIG.to_json(), valkey, load, to_ray=False)
        await replica.reconfigure({"b/v1": "v1"})
        assert await replica.answer([ask("ann", "v2")]) == ["unknown version"]

        await replica.reconfigure({"b/v1": "v1", "b/v2": "v2"})
        asked = [ask("ann", "v1"), ask("ann", "v2"), ask("bob", "v2"), ask("eve", "v1", late=True)]
        assert await replica.answer(asked) == ["stored", "stored", "stored", "late"]

        await replica.reconfigure({"b/v2": "v2"})
        assert await replica.answer([ask("ann", "v1")]) == ["unknown version"]
        await replica.reader.close()

    asyncio.run(story())
    with SlateStore(valkey) as store:
        for version, users in (("v1", ["ann"]), ("v2", ["ann", "bob"])):
            assert sorted(store.user_ids(version)) == users
            store.activate(version)
            assert {slate.model_version for slate in store.get_many(users).values()} == {version}


def test_only_what_somebody_asked_for_is_called_fresh(valkey: str) -> None:
    make_active(valkey, "v1")

    async def story() -> None:
        replica = Precompute(CONFIG.to_json(), valkey, load, to_ray=False)
        await replica.reconfigure({"b/v1": "v1"})
        by_sync = [ask(user, "v1")._replace(fresh=False) for user in ("ann", "bob")]
        assert await replica.answer([*by_sync, ask("bob", "v1"), ask("eve", "v1")]) == ["stored"] * 4
        await replica.reader.close()

    asyncio.run(story())
    with SlateStore(valkey) as store:
        assert {user: slate.fresh for user, slate in store.get_many(["ann", "bob", "eve"]).items()} == {
            "ann": False,
            "bob": True,
            "eve": True,
        }


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux alone")
def test_only_what_nobody_waits_for_gives_way_to_all_other_work(valkey: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_active(valkey, "v1")
    niceness, slates_of = [], precompute.slates_of

    def seen(*given: Any, **named: Any) -> Any:
        niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return slates_of(*given, **named)

    monkeypatch.setattr(precompute, "slates_of", seen)

    async def story() -> None:
        replica = Precompute(CONFIG.to_json(), valkey, load, to_ray=False)
        await replica.reconfigure({"b/v1": "v1"})
        by_sync = ask("ann", "v1")._replace(fresh=False)
        assert await replica.refresh([by_sync]) == ["stored"]
        assert await replica.answer([by_sync, ask("bob", "v1")]) == ["stored"] * 2
        await replica.reader.close()

    asyncio.run(story())
    assert niceness == [19, os.getpriority(os.PRIO_PROCESS, os.getpid())]


def test_a_damaged_history_keeps_nobody_else_from_a_slate(valkey: str) -> None:
    make_active(valkey, "v1")

    async def story() -> None:
        replica = Precompute(CONFIG.to_json(), valkey, load, to_ray=False)
        await replica.reconfigure({"b/v1": "v1"})
        await replica.reader.ask([("SET", replica.reader.keys.history("ann"), b"no history")])
        assert await replica.answer([ask("ann", "v1"), ask("bob", "v1")]) == ["stored", "stored"]
        await replica.reader.close()

    asyncio.run(story())


def test_a_batch_under_way_ends_with_the_model_it_began_with(valkey: str) -> None:
    make_active(valkey, "v1")

    async def story() -> None:
        replica = Precompute(CONFIG.to_json(), valkey, load, to_ray=False)
        await replica.reconfigure({"b/v1": "v1"})
        asking = asyncio.create_task(replica.answer([ask("ann", "v1")]))
        begun, go = asyncio.Event(), asyncio.Event()
        histories = replica.activity.histories

        async def slow(user_ids: Sequence[str]) -> Any:
            begun.set()
            await go.wait()
            return await histories(user_ids)

        replica.activity.histories = slow  # type: ignore[method-assign]
        await asyncio.wait_for(begun.wait(), timeout=30)
        await replica.reconfigure({"b/v2": "v2"})
        go.set()
        assert await asking == ["stored"]
        await replica.reader.close()

    asyncio.run(story())
    with SlateStore(valkey) as store:
        slate = store.get("ann")
        assert slate is not None and slate.model_version == "v1"


@pytest.mark.parametrize("bad", [{"b/damaged": "v2"}, {"b/v2": "v3"}])
def test_a_bundle_that_is_damaged_or_another_one_is_refused_and_the_old_one_keeps_serving(valkey: str, bad: dict[str, str]) -> None:
    make_active(valkey, "v1")

    async def story() -> None:
        replica = Precompute(CONFIG.to_json(), valkey, load, to_ray=False)
        with pytest.raises(IntegrityError):
            await replica.reconfigure(bad)  # at the start there is nothing to keep
        await replica.reconfigure({"b/v1": "v1"})
        await replica.reconfigure(bad)
        assert await replica.answer([ask("ann", "v1")]) == ["stored"]
        assert replica.meter.registry.get_sample_value("ray_rankgr_swaps_total", {"outcome": "refused"}) == 2
        await replica.reader.close()

    asyncio.run(story())


class FakeService:
    """Notes what is held and shown; computes slates at once."""

    def __init__(self, store: SlateStore, fail: bool = False) -> None:
        self.store, self.fail = store, fail
        self.held: list[set[str]] = []
        self.shown: list[str] = []
        self.users: list[str] = []
        self.meanwhile: Callable[[], object] = lambda: None  # happens while slates are computed

    def hold(self, bundles: Mapping[str, str]) -> None:
        self.held.append(set(bundles.values()))

    def show(self, bundle_uri: str, version: str) -> None:
        self.shown.append(version)

    def compute(self, requests: Sequence[SlateRequest]) -> list[Outcome]:
        self.users += [request.user_id for request in requests]
        assert not any(request.fresh for request in requests)
        self.meanwhile()
        if self.fail:
            return ["unknown version"] * len(requests)
        assert self.store.active_version() == "v1", "shown before it is complete"
        self.store.publish(requests[0].version, [Slate(one.user_id, (item_id(1),), (1.0,), one.version, 1) for one in requests])
        return ["stored"] * len(requests)


def bundle(folder: Path) -> tuple[str, str]:
    write_bundle(folder)
    return str(folder), storage.commit(str(folder), {}).digest[:12]


def sync_of(store: SlateStore, service: FakeService, champion: str | None) -> Sync:
    return Sync(service, store, lambda: champion, bundle_uri="old", version="v1", slate_size=3, batch=2)


@pytest.fixture
def served(valkey: str) -> Any:
    """v1 is active for ann, bob and eve; eve was here last, then a newcomer without a slate."""
    with SlateStore(valkey) as store:
        store.complete("v1", users=store.publish("v1", [Slate(u, (item_id(0),), (1.0,), "v1", 1) for u in ("ann", "bob", "eve")]))
        store.activate("v1")
        store._redis.zadd(store.keys.seen, {"eve": 2, "newcomer": 1})
        yield store


def test_a_new_champion_is_taken_over_active_users_first(served: SlateStore, tmp_path: Path) -> None:
    service, (uri, version) = FakeService(served), bundle(tmp_path / "new")
    sync = sync_of(served, service, uri)
    assert sync.once()
    assert (service.held, service.shown) == ([{"v1", version}, {version}], [version])
    assert service.users[:2] == ["eve", "newcomer"]
    assert sorted(service.users[2:]) == ["ann", "bob"]
    assert served.active_version() == version
    assert served.users(version) == 4
    assert served.fallback() is not None
    assert not sync.once()


def test_between_slates_the_loop_rests_so_that_it_computes_for_its_share_of_the_time_but_never_for_long(
    served: SlateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, (uri, _) = FakeService(served), bundle(tmp_path / "new")
    sync, waits, now = sync_of(served, service, uri), list[float](), [0.0]
    sync._share, sync._batch = 0.1, 1
    took = iter([0.2, 0.5, 60.0, 0.2])

    def passes() -> None:
        now[0] += next(took)

    service.meanwhile = passes
    monkeypatch.setattr("serving.sync.time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    monkeypatch.setattr(sync, "_stop", SimpleNamespace(wait=waits.append, is_set=lambda: False))
    assert sync.once()
    assert waits[:4] == [0.0, pytest.approx(1.8), pytest.approx(4.5), 30.0]
    assert sum(waits[4:]) == 0  # nobody is left to rest from


def test_of_slates_that_the_batch_job_published_only_a_few_are_computed_to_see_that_replicas_can(
    served: SlateStore, tmp_path: Path
) -> None:
    service, (uri, version) = FakeService(served), bundle(tmp_path / "new")
    served.complete(version, users=0)
    assert sync_of(served, service, uri).once()
    assert (service.users, served.active_version()) == (["eve", "newcomer"], version)


def test_a_version_that_replicas_do_not_hold_is_not_shown_though_its_slates_are_there(served: SlateStore, tmp_path: Path) -> None:
    service, (uri, version) = FakeService(served, fail=True), bundle(tmp_path / "new")
    served.complete(version, users=0)
    with pytest.raises(ServiceError, match="replicas did not compute 2 slates"):
        sync_of(served, service, uri).once()
    assert (service.held[-1], service.shown) == ({"v1"}, [])
    assert served.active_version() == "v1"


def test_slates_that_have_expired_are_computed_again(served: SlateStore, tmp_path: Path) -> None:
    service, (uri, version) = FakeService(served), bundle(tmp_path / "new")
    served.complete(version, users=3)  # of which none is there any more
    assert sync_of(served, service, uri).once()
    assert served.count(version) == 4


def test_a_damaged_champion_changes_nothing(served: SlateStore, tmp_path: Path) -> None:
    service, (uri, _) = FakeService(served), bundle(tmp_path / "new")
    with (tmp_path / "new" / "catalogue.parquet").open("r+b") as stream:
        stream.seek(10)
        stream.write(b"X")
    with pytest.raises(IntegrityError):
        sync_of(served, service, uri).once()
    assert (service.held, service.shown, served.active_version()) == ([], [], "v1")
    assert not sync_of(served, service, None).once()


def test_slates_that_cannot_be_computed_leave_the_old_ones(served: SlateStore, tmp_path: Path) -> None:
    service, (uri, version) = FakeService(served, fail=True), bundle(tmp_path / "new")
    with pytest.raises(ServiceError, match="4 of 4 slates"):
        sync_of(served, service, uri).once()
    assert (service.held, service.shown) == ([{"v1", version}, {"v1"}], [])
    assert served.active_version() == "v1"
    assert served.users(version) is None


def test_a_champion_that_is_replaced_while_its_slates_are_computed_is_not_shown(served: SlateStore, tmp_path: Path) -> None:
    service, (uri, _) = FakeService(served), bundle(tmp_path / "new")
    sync = sync_of(served, service, uri)

    def roll_back() -> None:
        sync.champion = lambda: "old"

    service.meanwhile = roll_back
    with pytest.raises(ServiceError, match="another version became champion"):
        sync.once()
    assert (service.held[-1], service.shown, served.active_version()) == ({"v1"}, [], "v1")
    assert not sync.once()


def test_a_version_that_somebody_else_shows_is_followed_long_before_the_next_round(served: SlateStore, tmp_path: Path) -> None:
    service, (uri, version) = FakeService(served), bundle(tmp_path / "new")
    champions = ["old"]
    sync = Sync(service, served, lambda: champions[0], bundle_uri="old", version="v1", slate_size=3)
    followed = threading.Event()

    def hold(bundles: Mapping[str, str]) -> None:
        if list(bundles) == [uri]:
            followed.set()

    service.hold, service.compute = hold, lambda requests: ["stored"] * len(requests)  # type: ignore[method-assign]
    with in_step(sync, every_s=3600):
        champions[0] = uri  # as a rollback or a bulk run: the registry first, then the readers
        served.complete(version, users=0)
        served.activate(version)
        assert followed.wait(60)
    assert sync.version == version


def test_a_start_with_slates_of_another_version_computes_those_of_the_champion(served: SlateStore, tmp_path: Path) -> None:
    service, (uri, version) = FakeService(served), bundle(tmp_path / "new")
    sync = Sync(service, served, lambda: uri, bundle_uri=uri, version=version, slate_size=3)
    assert sync.once()
    assert (sorted(service.users), served.active_version()) == (["ann", "bob", "eve", "newcomer"], version)
    assert not sync.once()


def test_at_the_end_a_swap_under_way_is_waited_for_and_goes_no_further(served: SlateStore, tmp_path: Path) -> None:
    service, (uri, version) = FakeService(served), bundle(tmp_path / "new")
    computing, sync = threading.Event(), sync_of(served, service, uri)

    def slow() -> None:
        computing.set()
        assert sync._stop.wait(60)  # the context is being left

    service.meanwhile = slow
    with in_step(sync, every_s=0.01):
        assert computing.wait(60)
    assert len(service.users) == 2  # one batch
    assert (service.held, set(service.shown)) == ([{"v1", version}], {"v1"})
    assert (served.active_version(), served.users(version)) == ("v1", None)
