"""Hour after hour: users come, are shown slates, do something; what they did is kept, and at the hour's end it is learned from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from infra.event_stream import Event
from infra.logs import track
from infra.records import Level
from infra.service_sections import SimulationConfig
from serving.simulation.world import Visit, World

FROZEN, STREAMING = "frozen", "streaming"
_TOGETHER = 32


@dataclass(frozen=True)
class Shown:
    """A slate that a user was shown.

    Attributes:
        source: see `serving.retrieval.SlateAnswer`.
    """

    user_id: str
    item_ids: tuple[str, ...]
    version: str
    source: str


class Platform(Protocol):
    """The service, as users meet it."""

    def slates(self, user_ids: Sequence[str]) -> list[Shown]:
        """Slates for users who are here."""
        ...

    def take(self, events: Sequence[Event]) -> None:
        """Keep what users did."""
        ...

    def end_hour(self) -> None:
        """Learn from what was kept and bring the service in step; a frozen one does neither."""
        ...


class Tally(NamedTuple):
    """Counts of one hour and model version."""

    hour: int
    version: str
    visits: int
    fresh: int
    views: int
    clicks: int
    purchases: int


def run(
    world: World, platform: Platform, user_ids: Sequence[str], item_ids: Sequence[str], settings: SimulationConfig, *, name: str
) -> list[Tally]:
    """Let all hours pass.

    Args:
        world: who comes, and what they do.
        platform: what they meet.
        user_ids: of the world's users.
        item_ids: of the world's items.
        settings: of the simulation.
        name: shown beside the progress.

    Returns:
        a line for each hour and version that was shown in it.
    """
    index = {item_id: number for number, item_id in enumerate(item_ids)}
    tallies: list[Tally] = []
    for hour in track(range(settings.hours), total=settings.hours, step=f"simulate {name}", unit="hours"):
        visitors = world.visitors(hour)
        for start in range(0, len(visitors), _TOGETHER):
            users = [int(user) for user in visitors[start : start + _TOGETHER]]
            shown = platform.slates([user_ids[user] for user in users])
            visits = [world.visit(u, hour, [index[i] for i in one.item_ids if i in index]) for u, one in zip(users, shown, strict=True)]
            platform.take([event for one, visit in zip(shown, visits, strict=True) for event in events_of(one, visit, hour, item_ids)])
            tallies += [_tally(hour, one, visit) for one, visit in zip(shown, visits, strict=True)]
        platform.end_hour()
    return _summed(tallies)


def events_of(shown: Shown, visit: Visit, hour: int, item_ids: Sequence[str]) -> list[Event]:
    """What a client tells of a visit: what came into view as one request, what was found elsewhere each by itself."""
    now, request = time.time_ns() // 1_000_000, f"{hour}-{shown.user_id}"
    found = [(item, Level.CLICK, f"{request}-found-{place}") for place, item in enumerate(visit.found)]
    told = [*((item, level, request) for item, level in visit.views), *found]
    return [
        Event(f"{request}-{place}", shown.user_id, item_ids[item], int(level), now + place, request_id)
        for place, (item, level, request_id) in enumerate(told)
    ]


def _tally(hour: int, shown: Shown, visit: Visit) -> Tally:
    purchases = sum(level == Level.PURCHASE for _, level in visit.views)
    return Tally(hour, shown.version, 1, int(shown.source == "fresh"), len(visit.views), visit.clicks, purchases)


def _summed(tallies: Sequence[Tally]) -> list[Tally]:
    sums: dict[tuple[int, str], Tally] = {}
    for one in tallies:
        key = (one.hour, one.version)
        before = sums.get(key)
        sums[key] = one if before is None else Tally(*key, *(a + b for a, b in zip(before[2:], one[2:], strict=True)))
    return list(sums.values())
