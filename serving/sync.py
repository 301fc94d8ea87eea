"""Keeps the service in step with the registry: a new champion's weights are swapped in and its slates computed, unnoticed.

The order is what makes it safe. The bundle is verified; model replicas load it beside the old one; slates of users are
computed under the new version, the most active first, while readers see the old ones; the pointer moves; only then is the
old bundle let go. Whatever fails on the way, the old version keeps serving and the next round begins again. A version that
somebody else shows to the readers (a rollback, a bulk run) begins a round at once: model replicas do not hold it yet. So does
a start with slates of another version than the champion's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Protocol

from infra import storage
from infra.catalogue import Catalogue
from infra.errors import RankGRError, ServiceError
from infra.logs import ProgressMeter, get_logger
from infra.slate_store import SlateStore
from serving.flights import Outcome, SlateRequest

_REFRESH_DEADLINE_S = 600.0
_LOOK_S, _AGAIN_S = 2.0, 30.0
_STOP_S = 30.0  # for what is under way: some slates, or bundles that replicas load
_LONGEST_PAUSE_S = 30.0  # also behind a replica that had to start first
_LIVE_SHARE = 0.5
_LOST_SHARE = 0.01  # of the users whose slates may be missing when a version is shown


class _StoppedError(Exception):
    """The loop was told to stop in the middle of a round."""


def version_of(uri: str) -> str:
    """The version of a committed folder, whose hashes are verified; raises `IntegrityError`."""
    return storage.open_committed(uri).digest[:12]


class Service(Protocol):
    """What the loop asks of a running application."""

    def hold(self, bundles: Mapping[str, str]) -> None:
        """Have model replicas hold exactly these bundles (URI -> version); returns when every one has seen it."""
        ...

    def show(self, bundle_uri: str, version: str) -> None:
        """Have the ingress show the items of a bundle; said again now and then for the sake of replicas that came later."""
        ...

    def compute(self, requests: Sequence[SlateRequest]) -> list[Outcome]:
        """Have slates computed and stored."""
        ...


class Sync:
    """One service, one registry.

    Args:
        service: to keep in step.
        store: its slates.
        champion: URI of the bundle that the registry names; None: there is none.
        bundle_uri: what is served now.
        version: of it.
        slate_size: of the popular items that are published with a version.
        batch: users whose slates are asked for at once; readers on the same cores feel long bursts, and many small ones are more work.
        share: of the time in which slates are computed; the rest belongs to those who wait for something.
        verify: returns the version of a bundle, or raises `IntegrityError`.
    """

    def __init__(
        self,
        service: Service,
        store: SlateStore,
        champion: Callable[[], str | None],
        *,
        bundle_uri: str,
        version: str,
        slate_size: int,
        batch: int = 8,
        share: float = 1.0,
        verify: Callable[[str], str] = version_of,
    ) -> None:
        self.service, self.store, self.champion = service, store, champion
        self.bundle_uri, self.version = bundle_uri, version
        self._slate_size, self._batch, self._share, self._verify = slate_size, batch, share, verify
        self._log = get_logger("sync")
        self._stop = threading.Event()

    def run(self, stop: threading.Event, every_s: float) -> None:
        """Begin a round now and then, and soon after readers were shown another version, until told to stop."""
        self._stop = stop
        due, dealt_with = time.monotonic() + every_s, self.version
        while not stop.wait(min(_LOOK_S, every_s)):
            self.service.show(self.bundle_uri, self.version)
            shown = self._shown()
            if time.monotonic() < due and shown in (None, dealt_with):
                continue
            pause = min(_AGAIN_S, every_s)
            try:
                pause = 0.0 if self.once() else every_s  # after a swap once more: the champion may be another one again
                if pause and shown not in (None, self.version):
                    self._log.warning("readers see a version that is not the champion's", seen=shown, champion=self.version)
            except _StoppedError:
                return
            except RankGRError as error:
                self._log.error("not in step, the old version keeps serving", reason=error.what, where=error.where)
            except Exception:
                self._log.exception("not in step, the old version keeps serving")
            due, dealt_with = time.monotonic() + pause, shown or dealt_with

    def _shown(self) -> str | None:
        try:
            return self.store.active_version()
        except ServiceError:
            return None  # readers have their fallback; a round that is due says what is wrong

    def once(self) -> bool:
        """Take over the champion unless it is served and shown; returns whether there was something to do.

        Raises:
            IntegrityError: its bundle is damaged; nothing has changed.
            ServiceError: its slates could not be computed; the old ones are still shown.
        """
        uri = self.champion()
        if uri is None or (uri == self.bundle_uri and self.store.active_version() in (None, self.version)):
            return False
        start, old = time.monotonic(), {self.bundle_uri: self.version}
        version = self._verify(uri)
        self._go_on()
        self.service.hold({**old, uri: version})
        try:
            if self._has_slates(version):
                self._probe(version)
            else:
                self._publish(uri, version)
            if self.champion() != uri:
                raise ServiceError("another version became champion meanwhile", where=version, mend="the next round follows it")
            if self.store.active_version() != version:
                self.store.activate(version)
        except Exception:
            if not self._stop.is_set():  # or else the service is about to go
                self.service.hold(old)
            raise
        self._go_on()
        self.service.show(uri, version)
        self.service.hold({uri: version})
        self.bundle_uri, self.version = uri, version
        dropped = self.store.drop_old()
        self._log.info("swapped", version=version, seconds=round(time.monotonic() - start, 1), dropped=dropped or None)
        return True

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise _StoppedError

    def _has_slates(self, version: str) -> bool:
        """Whether a version's slates are complete and most of them have not expired since."""
        users = self.store.users(version)
        return users is not None and self.store.count(version) >= _LIVE_SHARE * users

    def _probe(self, version: str) -> None:
        """Raise `ServiceError` unless replicas compute slates of a version: one that refused its bundle says so only here."""
        if lost := self._computed_without(list(islice(self._by_activity(), self._batch)), version):
            raise ServiceError(f"replicas did not compute {len(lost)} slates", where=version, mend="see the replicas' log")

    def _publish(self, uri: str, version: str) -> None:
        self.store.register(version)
        self.store.publish_fallback(version, Catalogue(uri).popular(self._slate_size, version))
        users = list(self._by_activity())
        lost = self._computed_without(self._computed_without(users, version), version)  # those that failed once more
        if len(lost) > _LOST_SHARE * len(users):
            raise ServiceError(f"{len(lost)} of {len(users)} slates could not be computed", where=version, mend="see the replicas' log")
        self.store.complete(version, users=len(users) - len(lost))

    def _computed_without(self, users: Sequence[str], version: str) -> list[str]:
        """Compute the slates of users; returns those for whom that failed."""
        failed, pause = list[str](), 0.0
        meter = ProgressMeter(len(users), step="sync", unit="users")
        try:
            for start in range(0, len(users), self._batch):
                self._stop.wait(pause)
                self._go_on()
                chunk, deadline, began = users[start : start + self._batch], time.time() + _REFRESH_DEADLINE_S, time.monotonic()
                outcomes = self.service.compute([SlateRequest(user_id, version, deadline, fresh=False) for user_id in chunk])
                failed += [user_id for user_id, outcome in zip(chunk, outcomes, strict=True) if outcome != "stored"]
                meter.advance(len(chunk))
                pause = min((time.monotonic() - began) * (1 / self._share - 1), _LONGEST_PAUSE_S)
        finally:
            meter.close()
        return failed

    def _by_activity(self) -> Iterator[str]:
        """Everybody who was here lately, the latest first, then all others with a slate."""
        active = self.store.active_version()
        known = dict.fromkeys(self.store.last_seen())
        yield from known
        others = dict.fromkeys(self.store.user_ids(active)) if active else {}
        yield from (user_id for user_id in others if user_id not in known)


@contextmanager
def in_step(sync: Sync, every_s: float) -> Iterator[None]:
    """Run the loop beside what happens inside the context; at its end what is under way is waited for, and nothing more begun."""
    stop = threading.Event()
    thread = threading.Thread(target=sync.run, args=(stop, every_s), name="sync", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_STOP_S)
        if thread.is_alive():
            get_logger("sync").warning("a swap is cut short, the next start begins it again", waited_s=_STOP_S)
