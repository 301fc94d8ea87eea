"""Reads that go together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from infra.coalesce import MAX_KEYS, Coalescer


class Store:
    """Answers each key with its upper case, one command at a time, when it is let."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.open = asyncio.Event()

    async def read(self, keys: Sequence[str]) -> Sequence[str]:
        self.commands.append(list(keys))
        await self.open.wait()
        if "bad" in keys:
            raise ConnectionError("gone")
        return [key.upper() for key in keys]


def test_what_is_asked_meanwhile_goes_together_and_each_gets_its_own() -> None:
    async def story() -> None:
        store = Store()
        reads = Coalescer(store.read)
        first = asyncio.create_task(reads.get(["a"]))
        await until(lambda: store.commands == [["a"]])
        others = [asyncio.create_task(reads.get(keys)) for keys in (["b", "c"], [], ["d"])]
        await asyncio.sleep(0)
        store.open.set()
        assert [await task for task in (first, *others)] == [["A"], ["B", "C"], [], ["D"]]
        assert store.commands == [["a"], ["b", "c", "d"]]
        assert await reads.get(["e"]) == ["E"]  # after a rest

    asyncio.run(story())


def test_a_command_has_an_end_but_keeps_a_callers_keys_together() -> None:
    async def story() -> None:
        store = Store()
        store.open.set()
        reads = Coalescer(store.read)
        large = [str(number) for number in range(MAX_KEYS + 1)]
        answers = await asyncio.gather(reads.get(["a"]), reads.get(large), reads.get(["b"]))
        assert [len(answer) for answer in answers] == [1, MAX_KEYS + 1, 1]
        assert [len(command) for command in store.commands] == [1, MAX_KEYS + 1, 1]

    asyncio.run(story())


def test_one_failure_is_told_to_all_who_waited_for_the_same_server() -> None:
    async def story() -> None:
        store = Store()
        reads = Coalescer(store.read)
        tasks = [asyncio.create_task(reads.get(["bad"]))]
        await until(lambda: len(store.commands) == 1)
        tasks.append(asyncio.create_task(reads.get(["a"])))
        await asyncio.sleep(0)
        store.open.set()
        assert all(isinstance(answer, ConnectionError) for answer in await asyncio.gather(*tasks, return_exceptions=True))
        assert await reads.get(["b"]) == ["B"]

    asyncio.run(story())


def test_a_caller_who_has_gone_keeps_nobody_from_an_answer() -> None:
    async def story() -> None:
        store = Store()
        reads = Coalescer(store.read)
        gone, stays = asyncio.create_task(reads.get(["a"])), asyncio.create_task(reads.get(["b"]))
        await until(lambda: len(store.commands) == 1)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        store.open.set()
        assert await stays == ["B"]

    asyncio.run(story())


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)
