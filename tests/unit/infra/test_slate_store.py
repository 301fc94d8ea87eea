"""Slates are published version by version and read one version at a time, against a real Valkey."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError, DataError, IntegrityError, ServiceError
from infra.local import free_port
from infra.slate_codec import decode_history, decode_slate, encode_history, encode_slate
from infra.slate_store import AsyncSlateReader, Slate, SlateStore, UserHistory, without_password

ids = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=20).map(tuple)


def slate(user: str, version: str, *items: str) -> Slate:
    return Slate(user, items, tuple(float(-rank) for rank in range(len(items))), version, 1_700_000_000_000)


@pytest.fixture
def store(valkey: str) -> Iterator[SlateStore]:
    with SlateStore(valkey, prefix="test") as store:
        yield store


def publish(store: SlateStore, version: str, *users: str) -> None:
    store.complete(version, users=store.publish(version, [slate(user, version, f"of-{version}") for user in users]))


@given(ids, st.data())
def test_a_slate_and_a_history_come_back_as_they_went_in(item_ids: tuple[str, ...], data: st.DataObject) -> None:
    n = len(item_ids)
    scores = data.draw(st.lists(st.floats(width=32, allow_nan=False), min_size=n, max_size=n).map(tuple))
    levels = data.draw(st.lists(st.integers(1, 4), min_size=n, max_size=n).map(tuple))
    one = Slate("u", item_ids, scores, "v1", 1_700_000_000_000)
    assert decode_slate("u", encode_slate(one)) == one
    history = UserHistory("u", item_ids, levels, until=1_700_000_000_000)
    assert decode_history("u", encode_history(history)) == history


@given(st.binary(max_size=60), st.integers(0, 60))
def test_bytes_that_are_no_slate_are_refused(noise: bytes, cut: int) -> None:
    whole = encode_slate(slate("u", "v1", "a", "b"))
    for blob in (noise if noise[:1] != b"\x01" else b"", whole[: min(cut, len(whole) - 1)], b"\x09" + whole[1:]):
        with pytest.raises(IntegrityError):
            decode_slate("u", blob)


def test_a_score_that_is_no_number_is_damage() -> None:
    with pytest.raises(IntegrityError, match="no number"):
        decode_slate("u", encode_slate(Slate("u", ("a", "b"), (1.0, float("nan")), "v1", 1)))


def test_a_version_is_seen_only_once_it_is_complete_and_active(store: SlateStore) -> None:
    assert store.active_version() is None
    assert store.get("ann") is None

    store.publish("v1", [slate("ann", "v1", "a", "b"), slate("bob", "v1", "c")])
    assert store.get("ann") is None
    assert store.users("v1") is None
    with pytest.raises(IntegrityError, match="not complete"):
        store.activate("v1")

    store.complete("v1", users=2)
    store.activate("v1")
    assert store.users("v1") == store.count("v1") == 2
    assert store.get("ann") == slate("ann", "v1", "a", "b")
    assert list(store.get_many(["bob", "nobody", "ann"])) == ["bob", "ann"]
    assert store.get_many([]) == {}


def test_publishing_again_overwrites(store: SlateStore) -> None:
    publish(store, "v1", "ann")
    store.publish("v1", [slate("ann", "v1", "new")])
    store.activate("v1")
    assert store.get("ann") == slate("ann", "v1", "new")
    store.put_one(slate("ann", "v1", "newer"))
    assert store.get("ann") == slate("ann", "v1", "newer")
    assert store.count("v1") == 1


def test_more_slates_than_a_batch(store: SlateStore) -> None:
    users = [f"user-{i}" for i in range(1234)]
    assert store.publish("v1", (slate(user, "v1", "a") for user in users), batch=100) == 1234
    store.complete("v1", users=1234)
    store.activate("v1")
    assert sorted(store.get_many(users)) == sorted(users)


def test_old_versions_go_but_the_active_one_stays(store: SlateStore) -> None:
    for version in ("v1", "v2", "v3", "v4"):
        publish(store, version, "ann", "bob")
        store.publish_fallback(version, slate("", version, "popular"))
    store.activate("v1")
    assert store.versions() == ["v4", "v3", "v2", "v1"]

    assert store.drop_old() == ["v2"]
    assert store.versions() == ["v4", "v3", "v1"]
    assert store.count("v2") == 0
    assert store.count("v3") == 2
    with pytest.raises(IntegrityError):
        store.activate("v2")
    assert store.get("ann") == slate("ann", "v1", "of-v1")
    fallback = store.fallback()
    assert fallback is not None
    assert fallback.item_ids == ("popular",)


def test_versions_stay_for_a_while_after_they_were_active(store: SlateStore, valkey: str) -> None:
    for version in ("v1", "v2", "v3", "v4"):
        publish(store, version, "ann", "bob")
        store.activate(version)
    with SlateStore(valkey, prefix="test", keep_versions=1, grace_minutes=60) as patient:
        assert patient.drop_old() == []
    with redis.Redis.from_url(valkey) as client:  # v2 ceased to be active two hours ago
        client.zincrby("test:retired", -2 * 3600e6, "v2")
    with SlateStore(valkey, prefix="test", keep_versions=1, grace_minutes=60) as patient:
        assert patient.drop_old() == ["v2"]
        assert patient.versions() == ["v4", "v3", "v1"]
        assert sorted(patient.user_ids("v1")) == ["ann", "bob"]
    assert store.drop_old() == ["v1"]


def test_dropping_a_version_spares_others_with_a_similar_name(store: SlateStore, valkey: str) -> None:
    with SlateStore(valkey, prefix="test", keep_versions=1) as frugal:
        for version in ("v1", "v1.1", "v1-x"):
            publish(frugal, version, "ann", "v1:ann", "*")
        frugal.activate("v1.1")
        assert frugal.drop_old() == ["v1"]
        assert [frugal.count(version) for version in ("v1", "v1.1", "v1-x")] == [0, 3, 3]


def test_slates_expire_but_not_all_at_once(store: SlateStore, valkey: str) -> None:
    store.publish("v1", [slate(str(i), "v1", "a") for i in range(50)])
    with redis.Redis.from_url(valkey) as client:
        lives = {client.pttl(store.keys.slate("v1", str(i))) for i in range(50)}
    assert len(lives) > 10
    assert min(lives) > 72 * 3_600_000 - 10_000
    assert max(lives) <= 72 * 3_600_000 * 1.1


@pytest.mark.parametrize("user", ["a:b", "test:active", "*", "vendée 🙂", "a\nb", " "])
def test_user_ids_are_opaque(store: SlateStore, user: str) -> None:
    publish(store, "v1", user, "other")
    store.activate("v1")
    assert store.get(user) == slate(user, "v1", "of-v1")
    assert store.active_version() == "v1"
    store.publish_histories([UserHistory(user, ("a", "b"), (2, 4))])
    assert store.history(user) == UserHistory(user, ("a", "b"), (2, 4))
    assert store.history("nobody") is None


@pytest.mark.parametrize("user", ["", "x" * 1025, "\ud800"])
def test_user_ids_that_cannot_be_keys_are_refused(store: SlateStore, user: str) -> None:
    with pytest.raises(DataError, match="user id"):
        store.get(user)


@pytest.mark.parametrize("name", ["", "a:b", "a*", "a b", "x" * 129])
def test_prefixes_and_versions_that_could_escape_are_refused(store: SlateStore, valkey: str, name: str) -> None:
    with pytest.raises(ConfigError):
        SlateStore(valkey, prefix=name)
    with pytest.raises(ConfigError):
        store.publish(name, [])


def test_two_tenants_do_not_see_each_other(store: SlateStore, valkey: str) -> None:
    publish(store, "v1", "ann")
    store.activate("v1")
    with SlateStore(valkey, prefix="test2") as other:
        assert other.versions() == []
        assert other.get("ann") is None


def test_redis_down_is_said_without_the_password() -> None:
    url = f"redis://me:secret@127.0.0.1:{free_port()}/3?password=secret"
    with SlateStore(url) as store, pytest.raises(ServiceError) as caught:
        store.get("ann")
    assert "secret" not in str(caught.value)
    assert "127.0.0.1" in caught.value.where
    assert caught.value.mend
    assert without_password(url).endswith("/3")


def test_a_url_that_is_none() -> None:
    for url in ("http://example.org", "redis://[", "nonsense"):
        with pytest.raises(ConfigError, match="not a Redis URL"):
            SlateStore(url)


def test_a_reader_on_an_event_loop_reads_the_same(store: SlateStore, valkey: str) -> None:
    async def story() -> None:
        async with AsyncSlateReader(valkey, prefix="test") as reader:
            assert await reader.get("ann") is None
            publish(store, "v1", "ann")
            store.activate("v1")
            assert await reader.get("ann") == store.get("ann")

            publish(store, "v2", "ann")
            store.publish_fallback("v2", slate("", "v2", "popular"))
            store.activate("v2")
            assert await reader.get("ann") == slate("ann", "v2", "of-v2")
            assert await reader.fallback("v2") == slate("", "v2", "popular")
            assert await reader.get_many([]) == {}

            fresh, before, dropped = (
                slate("eve", "v2", "fresh"),
                slate("eve", "v1", "of before"),
                slate("eve", "v0", "of one that was dropped"),
            )
            assert await reader.put([dropped, fresh, before]) == [False, True, True]
            assert await reader.put([dropped]) == [False]
            assert await reader.put([]) == []
            assert await reader.get("eve") == fresh

    asyncio.run(story())


def test_an_event_loop_hears_soon_that_redis_is_down() -> None:
    async def story() -> None:
        async with AsyncSlateReader(f"redis://127.0.0.1:{free_port()}") as reader:
            with pytest.raises(ServiceError):
                await asyncio.wait_for(reader.get("ann"), timeout=2.0)

    asyncio.run(story())


def test_readers_never_mix_versions_while_a_publisher_switches(store: SlateStore, valkey: str) -> None:
    users = [f"user-{i}" for i in range(20)]
    publish(store, "v0", *users)
    store.activate("v0")
    done = threading.Event()

    def switch() -> None:
        with SlateStore(valkey, prefix="test", keep_versions=1) as writer:
            for turn in range(1, 40):
                publish(writer, f"v{turn}", *users)
                writer.activate(f"v{turn}")
                writer.drop_old()
        done.set()

    async def read() -> set[str]:
        seen: set[str] = set()
        async with AsyncSlateReader(valkey, prefix="test") as reader:
            while not done.is_set():
                slates = await reader.get_many(users)
                versions = {found.model_version for found in slates.values()}
                assert len(slates) == len(users), "a version that was dropped was read"
                assert len(versions) == 1
                seen |= versions
        return seen

    writer = threading.Thread(target=switch)
    writer.start()
    try:
        seen = asyncio.run(read())
    finally:
        done.set()
        writer.join()
    assert len(seen) > 1
