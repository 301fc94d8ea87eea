"""Reads of many callers in one command: while one is under way the next ones gather, and go together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

Read = Callable[[Sequence[str]], Awaitable[Sequence[Any]]]
MAX_KEYS = 256
"""Of a command, unless one caller asks for more."""


class Coalescer:
    """What a busy event loop asks of Redis, a few commands instead of one a caller; a caller alone waits for nobody.

    Each caller's keys stay together in one command, so what holds for the command (MGET is atomic) holds for them.

    Args:
        read: values of some keys, in their order.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._waiting: list[tuple[Sequence[str], asyncio.Future[Sequence[Any]]]] = []
        self._task: asyncio.Task[None] | None = None

    async def get(self, keys: Sequence[str]) -> Sequence[Any]:
        """Values of some keys; raises what `read` does."""
        answer: asyncio.Future[Sequence[Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((keys, answer))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._together(self._next())
        finally:
            self._task = None
            for _, answer in self._waiting:  # only where the loop ends
                answer.cancel()

    def _next(self) -> list[tuple[Sequence[str], asyncio.Future[Sequence[Any]]]]:
        """Those who have waited longest, as many as fit."""
        taken = keys = 0
        for asked, _ in self._waiting:
            if taken and keys + len(asked) > MAX_KEYS:
                break
            taken, keys = taken + 1, keys + len(asked)
        batch, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return batch

    async def _together(self, batch: list[tuple[Sequence[str], asyncio.Future[Sequence[Any]]]]) -> None:
        try:
            values = await self._read([key for keys, _ in batch for key in keys])
        except Exception as error:
            # Those behind have waited for the same server: one time-out is enough for all.
            for _, answer in (*batch, *self._waiting):
                if not answer.done():
                    answer.set_exception(error)
            self._waiting = []
        else:
            at = 0
            for keys, answer in batch:
                if not answer.done():  # its caller may have gone
                    answer.set_result(values[at : at + len(keys)])
                at += len(keys)
        finally:
            for _, answer in batch:
                answer.cancel()  # does nothing to those that have an answer
