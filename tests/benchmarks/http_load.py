"""An HTTP client lean enough to share two cores with the server that it measures: `python -m tests.benchmarks.http_load JOB.json`.

A process of its own, on uvloop. Without a rate each connection sends its next request when it has an answer (closed loop).
With one, requests fall due at even intervals and their time counts from then on, whether or not a connection was free: a
server that stalls is not spared what it kept waiting.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
import time
import zlib
from collections import deque
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import uvloop

_SLATE_END = b'],"model_version":"'
_PATIENCE_S = 30.0


class Done(NamedTuple):
    """A request that ended: when it was due (Unix time), how long it took, its status (0: the connection broke).

    Attributes:
        crc: of the items of a slate.
        version: index of the model version in the answer, -1 without.
        mixed: the answer holds slates of more than one version.
    """

    at: float
    seconds: float
    status: int
    request: int
    version: int
    crc: int
    mixed: bool


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self._buffer, self._end = bytearray(), -1
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self.transport: Any = None  # uvloop's is no asyncio.Transport

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((0, b""))

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, bytes]]:
        """Status and body."""
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._end < 0 and not self._read_head():
            return
        if len(self._buffer) >= self._end and self._answer is not None and not self._answer.done():
            body = bytes(self._buffer[self._body_at : self._end])
            status = int(self._buffer[9:12])
            del self._buffer[: self._end]
            self._end = -1
            self._answer.set_result((status, body))

    def _read_head(self) -> bool:
        head_end = self._buffer.find(b"\r\n\r\n")
        if head_end < 0:
            return False
        head = bytes(self._buffer[:head_end]).lower()
        at = head.find(b"\r\ncontent-length:")
        if at < 0:
            raise ValueError("an answer without Content-Length")
        self._body_at = head_end + 4
        self._end = self._body_at + int(head[at + 17 :].partition(b"\r\n")[0])
        return True


class Load:
    """Runs a job.

    Args:
        job: `url`; `requests`, each [method, target, headers, body]; `connections`; `seconds`; `rate` a second, null for a closed
            loop; `check`: look into the slates; `out`: the file for what was done; `seed`.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.done = job, list[Done]()
        parts = urlsplit(job["url"])
        self._host, self._port = parts.hostname or "", parts.port or 80
        self._requests = [encode(parts.netloc, *one) for one in job["requests"]]
        self._order = np.random.default_rng(job["seed"]).integers(0, len(self._requests), 1_000_003).tolist()
        self._versions: dict[bytes, int] = {}
        self._sent, self._ends = 0, 0.0

    async def run(self) -> None:
        """Work, then write what was done."""
        self._ends, rate = time.time() + self.job["seconds"], self.job["rate"]
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.job["seconds"] + _PATIENCE_S):
                if rate is None:
                    await asyncio.gather(*(self._closed() for _ in range(self.job["connections"])))
                else:
                    await self._open(rate)
        columns = {name: np.array([getattr(one, name) for one in self.done]) for name in Done._fields}
        np.savez(self.job["out"], versions=np.array([v.decode() for v in self._versions]), **columns)

    def _stop(self) -> None:
        """SIGTERM: nothing more falls due, what is under way is waited for."""
        self._ends = time.time()

    async def _closed(self) -> None:
        connection = None
        while (now := time.time()) < self._ends:
            connection = await self._send(connection, now)

    async def _open(self, rate: float) -> None:
        """As many requests at once as there are connections; what is due meanwhile waits."""
        start, idle = time.time(), asyncio.Queue[Connection | None]()
        for _ in range(self.job["connections"]):
            idle.put_nowait(None)
        tasks: deque[asyncio.Task[None]] = deque()

        async def send(connection: Connection | None, at: float) -> None:
            idle.put_nowait(await self._send(connection, at))

        for due in (start + number / rate for number in count()):
            if due >= self._ends:
                break
            if (wait := due - time.time()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(send(await idle.get(), due)))
            while tasks and tasks[0].done():
                tasks.popleft().result()
        await asyncio.gather(*tasks)

    async def _send(self, connection: Connection | None, at: float) -> Connection | None:
        request = self._order[self._sent % len(self._order)]
        self._sent += 1
        status, body = 0, b""
        try:
            if connection is None or connection.transport is None:
                _, connection = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
            status, body = await connection.ask(self._requests[request])
        except OSError:
            connection = None
        finally:  # what is cancelled at the end has failed
            self.done.append(Done(at, time.time() - at, status, request, *self._look(body)))
        return connection

    def _look(self, body: bytes) -> tuple[int, int, bool]:
        if not self.job["check"] or _SLATE_END not in body:
            return -1, 0, False
        pieces = body.split(_SLATE_END)
        versions = {piece[: piece.index(b'"')] for piece in pieces[1:]}
        version = self._versions.setdefault(next(iter(versions)), len(self._versions))
        return version, zlib.crc32(pieces[0][pieces[0].index(b"[") :]), len(versions) > 1


def encode(host: str, method: str, target: str, headers: dict[str, str], body: str) -> bytes:
    """A request as it is sent."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    lines += [f"Content-Length: {len(body.encode())}", "Content-Type: application/json"] if body else []
    return "\r\n".join([*lines, "", body]).encode()


if __name__ == "__main__":
    gc.disable()  # it would look over what was done again and again, 100 ms and more, and lay that at the server's door
    uvloop.run(Load(json.loads(Path(sys.argv[1]).read_text("utf-8"))).run())
