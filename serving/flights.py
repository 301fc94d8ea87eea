"""Latency masking (RankGR 3.4): a slate is computed while the caller does other work, once at a time, within limits."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Literal, NamedTuple

import structlog

from infra.activity import UserActivity
from infra.errors import ServiceError
from infra.logs import get_logger
from infra.metrics import Meter
from serving.intake import Overloaded

Outcome = Literal["stored", "late", "unknown version", "dropped version", "failed"]
_REVALIDATION_SHARE = 0.5  # of the queue: slates that somebody is about to ask for go before those that are only old


class SlateRequest(NamedTuple):
    """A slate to compute.

    Attributes:
        version: of the model that computes it.
        deadline: seconds since the epoch; later it is not worth computing.
        request_id: of the HTTP request that asked for it, for the logs.
        fresh: somebody asked for it, so that it is labelled as fresh.
    """

    user_id: str
    version: str
    deadline: float
    request_id: str = ""
    fresh: bool = True


class FreshSlates:
    """Computations under way in one ingress replica, one a user and version.

    Args:
        compute: asks a model replica; the answer says what became of it.
        activity: whose claims keep several ingress replicas from revalidating one slate.
        max_pending: computations under way at most.
        deadline_s: of each.
        meter: counts.
    """

    def __init__(
        self,
        compute: Callable[[SlateRequest], Awaitable[Outcome]],
        activity: UserActivity,
        *,
        max_pending: int,
        deadline_s: float,
        meter: Meter,
    ) -> None:
        self._compute, self._activity = compute, activity
        self._max_pending, self._deadline_s, self._meter = max_pending, deadline_s, meter
        self._again: dict[tuple[str, str], str | None] = {}  # flight -> the request that came since it started, if one did
        self._tasks: set[asyncio.Task[None]] = set()
        self._mean_s = 1.0
        self._log = get_logger("ingress")

    @property
    def pending(self) -> int:
        """Computations under way."""
        return len(self._again)

    def admit(self, user_id: str, version: str) -> None:
        """Refuse what there is no room for.

        Raises:
            Overloaded: too many are under way.
        """
        if self.pending >= self._max_pending and (user_id, version) not in self._again:
            self._meter.count("rankgr_triggers", outcome="shed")
            raise Overloaded("too many slates are being computed", retry_after_s=max(1, math.ceil(self._mean_s)))

    def start(self, user_id: str, version: str) -> None:
        """Start computing a slate; one that is under way is computed once more when it ends, since events may have come in.

        Raises:
            Overloaded: as `admit`.
        """
        self.admit(user_id, version)
        key = (user_id, version)
        if key in self._again:
            self._again[key] = _request_id()
            self._meter.count("rankgr_triggers", outcome="joined")
            self._log.info("a computation is under way, another follows", version=version)
        else:
            self._meter.count("rankgr_triggers", outcome="accepted")
            self._launch(key, claim=False)

    def revalidate(self, user_id: str, version: str) -> None:
        """Start computing a slate that has become old, unless that is under way somewhere or there is much to do."""
        key = (user_id, version)
        if key not in self._again and self.pending < _REVALIDATION_SHARE * self._max_pending:
            self._launch(key, claim=True)

    def _launch(self, key: tuple[str, str], *, claim: bool) -> None:
        self._again[key] = None
        self._meter.set("rankgr_pending_slates", self.pending)
        task = asyncio.create_task(self._fly(key, claim=claim))
        self._tasks.add(task)  # a task that nobody holds may be collected before it ends
        task.add_done_callback(self._tasks.discard)

    async def _fly(self, key: tuple[str, str], *, claim: bool) -> None:
        user_id, version = key
        try:
            if claim and not await self._activity.claim(version, user_id, self._deadline_s):
                return
            await self._once(user_id, version)
            while (request_id := self._again[key]) is not None:
                self._again[key] = None
                with structlog.contextvars.bound_contextvars(request_id=request_id):
                    await self._once(user_id, version)
        except ServiceError as error:  # the claim could not be made
            self._log.warning("an old slate is not computed anew", reason=error.what)
        finally:
            del self._again[key]
            self._meter.set("rankgr_pending_slates", self.pending)

    async def _once(self, user_id: str, version: str) -> None:
        start = time.monotonic()
        request = SlateRequest(user_id, version, time.time() + self._deadline_s, _request_id())
        try:
            outcome: str = await asyncio.wait_for(self._compute(request), self._deadline_s)
        except TimeoutError:
            outcome = "late"
        except Exception as error:
            # Nobody waits for the result; the user keeps the slate of before.
            outcome = "failed"
            self._log.warning("a fresh slate could not be computed", reason=(str(error).splitlines() or [repr(error)])[0])
        seconds = time.monotonic() - start
        self._mean_s += 0.1 * (seconds - self._mean_s)
        self._meter.count("rankgr_fresh_slates", outcome=outcome)
        if outcome == "stored":
            self._meter.observe("rankgr_fresh_seconds", seconds)
        self._log.info("fresh slate", outcome=outcome, version=version, seconds=round(seconds, 3))


def _request_id() -> str:
    """Of the HTTP request that this task works for; empty: of none."""
    return str(structlog.contextvars.get_contextvars().get("request_id", ""))
