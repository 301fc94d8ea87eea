"""Events go through a real Valkey once each, in order, whatever is sent twice, cut off or poisoned."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError, ServiceError
from infra.event_stream import AsyncEventWriter, Event, EventStream, Lag, Limits, encode_event
from infra.local import free_port

T0 = 1_700_000_000_000


def event(number: int, **changes: Any) -> Event:
    return replace(Event(f"e{number}", f"u{number % 3}", f"i{number % 5}", 1 + number % 4, T0 + number, "r1"), **changes)


def append(url: str, *events: Event, prefix: str = "test", max_length: int = 1000) -> None:
    async def write() -> None:
        async with AsyncEventWriter(url, prefix=prefix, max_length=max_length) as writer:
            await writer.append(events)

    asyncio.run(write())


def reader(url: str, **settings: Any) -> EventStream:
    return EventStream(url, prefix="test", **{"limits": Limits(max_age_ms=None)} | settings)


def events_of(found: list[tuple[str, Event]]) -> list[Event]:
    return [event for _, event in found]


def pending(client: Any) -> int:
    return int(client.xpending("test:events", "trainer")["pending"])


@pytest.fixture
def client(valkey: str) -> Iterator[Any]:
    with redis.Redis.from_url(valkey) as client:
        yield client


def test_events_come_in_order_and_are_acknowledged_when_told(valkey: str, client: Any) -> None:
    with reader(valkey) as stream:
        assert stream.read(10) == []
        assert stream.lag().entries == 0
        append(valkey, *map(event, range(5)))
        append(valkey)
        first = stream.read(3)
        assert events_of(first) == [event(0), event(1), event(2)]
        assert stream.position == first[-1][0]
        assert stream.lag().entries == 2
        assert 0 <= stream.lag().seconds < 60
        assert events_of(stream.read(3, block_ms=5)) == [event(3), event(4)]
        assert pending(client) == 5
        stream.acknowledge(first[-1][0])
        assert pending(client) == 2
        assert stream.lag() == Lag(0, 0.0)


def test_a_restart_goes_on_from_the_checkpoint_and_not_from_the_group(valkey: str, client: Any) -> None:
    append(valkey, *map(event, range(6)))
    with reader(valkey) as stream:
        stream.read(2)
        state = json.loads(json.dumps(stream.state()))
        assert events_of(stream.read(3)) == [event(2), event(3), event(4)]
    with reader(valkey, consumer="another") as stream:
        stream.restore(state)
        assert events_of(stream.read(10)) == [event(2), event(3), event(4), event(5)]
        stream.acknowledge(stream.position)  # also what the first process left behind
        assert pending(client) == 0
        stream.seek("0-0")
        assert stream.read(10) == []
        assert stream.rejected == {"duplicate": 6}
        stream.restore({})
        assert events_of(stream.read(10)) == [event(n) for n in range(6)]


def test_copies_are_dropped_within_the_window_and_the_window_is_part_of_the_state(valkey: str) -> None:
    append(valkey, event(0), event(0), event(1), event(2), event(1), event(0))
    with reader(valkey, window=2) as stream:
        assert events_of(stream.read(2)) == [event(0)]
        state = stream.state()
    with reader(valkey, window=2) as stream:
        stream.restore(state)
        # e0 has left the window of two when it comes for the third time.
        assert events_of(stream.read(9)) == [event(1), event(2), event(0)]
        assert stream.rejected == {"duplicate": 2}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=st.lists(st.integers(0, 6), max_size=25), cuts=st.lists(st.integers(1, 6), max_size=8), data=st.data())
def test_whatever_is_read_and_thrown_away_each_event_is_handed_out_once(
    valkey: str, client: Any, numbers: list[int], cuts: list[int], data: st.DataObject
) -> None:
    client.delete("test:events")
    append(valkey, *map(event, numbers))
    committed: list[Event] = []
    state: dict[str, Any] = {}
    for cut in [*cuts, 100]:
        with reader(valkey) as stream:
            stream.restore(state)
            found = events_of(stream.read(cut))
            if cut == 100 or data.draw(st.booleans()):  # else the process dies before its checkpoint
                committed, state = committed + found, stream.state()
    assert committed == [event(n) for n in dict.fromkeys(numbers)]


def poison() -> dict[str, dict[str, Any]]:
    def changed(**changes: Any) -> dict[str, Any]:
        return {"event": json.dumps({**json.loads(encode_event(event(0))), "event_id": "poison", **changes})}

    return {
        "not JSON": {"event": b"\xff{"},
        "fields are missing or unknown": {"event": '{"event_id": "x"}'},
        "a field is of another type": changed(user_id="\ud800"),
        "unknown level": changed(level=9),
        "too large": changed(item_id="x" * 20_000),
        "from the future": changed(timestamp_ms=T0 * 10),
        "too old": changed(timestamp_ms=5),
        "unknown item": changed(item_id="nobody knows"),
    }


def test_poisoned_entries_are_quarantined_counted_and_acknowledged(valkey: str, client: Any) -> None:
    limits = Limits(max_age_ms=200 * 365 * 86_400_000 // 10)  # twenty years
    with reader(valkey, knows=lambda item_id: item_id.startswith("i"), limits=limits) as stream:
        for number, fields in enumerate(poison().values()):
            append(valkey, event(number))
            client.xadd("test:events", fields)
        expected = [event(number) for number in range(len(poison()))]
        assert events_of(stream.read(100)) == expected
        assert stream.rejected == dict.fromkeys(poison(), 1)
        reasons = [fields[b"reason"].decode() for _, fields in client.xrange("test:quarantine")]
        assert reasons == list(poison())
        assert pending(client) == len(expected)
        # A replay counts again from the checkpoint's counts, and adds nothing to the quarantine.
        stream.restore({})
        assert events_of(stream.read(100)) == expected
        assert stream.rejected == dict.fromkeys(poison(), 1)
        assert client.xlen("test:quarantine") == len(poison())


@pytest.mark.parametrize(
    "content",
    [b"[]", b"null", b"[" * 8000, b'{"level": []}', b"", json.dumps(["e"] * 5).encode()],
)
def test_odd_json_is_no_error(valkey: str, client: Any, content: bytes) -> None:
    client.xadd("test:events", {"event": content})
    client.xadd("test:events", {"other": content})
    with reader(valkey) as stream:
        assert stream.read(5) == []
        assert sum(stream.rejected.values()) == 2


@pytest.mark.parametrize(
    ("field", "value"), [("timestamp_ms", True), ("timestamp_ms", -1), ("event_id", ""), ("request_id", 0), ("level", True)]
)
def test_types_are_strict(valkey: str, client: Any, field: str, value: Any) -> None:
    client.xadd("test:events", {"event": json.dumps({**json.loads(encode_event(event(0))), field: value})})
    with reader(valkey) as stream:
        assert stream.read(5) == []


def test_an_answer_that_is_lost_on_the_way_comes_again(valkey: str, monkeypatch: pytest.MonkeyPatch) -> None:
    append(valkey, *map(event, range(4)))
    with reader(valkey) as stream:
        assert events_of(stream.read(1)) == [event(0)]
        ask, lost = stream._redis.xreadgroup, []

        def answer_is_lost(*args: Any, **options: Any) -> Any:
            found = ask(*args, **options)
            if not lost:
                lost.append(found)
                raise redis.ConnectionError("reset by peer")
            return found

        monkeypatch.setattr(stream._redis, "xreadgroup", answer_is_lost)
        assert events_of(stream.read(2)) == [event(1), event(2)]
        assert lost


def test_a_quarantine_that_fails_loses_no_event(valkey: str, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    append(valkey, event(0))
    client.xadd("test:events", {"event": "{"})
    with reader(valkey) as stream:
        with monkeypatch.context() as broken:
            broken.setattr(stream._redis, "pipeline", lambda **_: (_ for _ in ()).throw(redis.ResponseError("out of memory")))
            with pytest.raises(ServiceError, match="out of memory"):
                stream.read(5)
        assert events_of(stream.read(5)) == [event(0)]
        assert stream.rejected == {"not JSON": 1}


def test_what_the_stream_dropped_unread_is_counted(valkey: str, client: Any) -> None:
    append(valkey, *map(event, range(8)))
    with reader(valkey) as stream:
        stream.read(2)
        client.xtrim("test:events", maxlen=3, approximate=False)
        assert stream.lag().entries == 3
        assert stream.rejected == {"trimmed before it was read": 3}
        assert events_of(stream.read(9)) == [event(5), event(6), event(7)]
        assert stream.lag().entries == 0
        assert stream.rejected == {"trimmed before it was read": 3}


def test_the_writer_bounds_the_stream(valkey: str, client: Any) -> None:
    append(valkey, *map(event, range(1000)), max_length=100)
    assert 100 <= client.xlen("test:events") <= 300


def test_a_stream_that_vanishes_begins_anew(valkey: str, client: Any) -> None:
    append(valkey, event(0))
    with reader(valkey) as stream:
        stream.read(5)
        client.delete("test:events")
        assert stream.read(5) == []
        stream.acknowledge(stream.position)
        append(valkey, event(1))
        assert events_of(stream.read(5)) == [event(1)]


def test_tenants_do_not_see_each_other(valkey: str) -> None:
    append(valkey, event(0), prefix="other")
    with reader(valkey) as stream:
        assert stream.read(5) == []


def test_no_redis_is_a_service_error_and_a_bad_url_or_prefix_a_config_error() -> None:
    nowhere = f"redis://127.0.0.1:{free_port()}/0"
    with reader(nowhere) as stream, pytest.raises(ServiceError, match="does not answer"):
        stream.read(1)
    with pytest.raises(ServiceError, match="does not answer"):
        append(nowhere, event(0))
    for url, prefix in (("http://x:secret@y", "a"), ("redis://y", "a:b")):
        with pytest.raises(ConfigError) as caught:
            EventStream(url, prefix=prefix)
        assert "secret" not in str(caught.value)
        with pytest.raises(ConfigError):
            AsyncEventWriter(url, prefix=prefix)
