"""Two arms of one simulation, under the same seeds: the champion as it is, and the champion that goes on learning.

Each has services of its own in a folder of its own (Valkey, Ray Serve, registry), so that nothing of the workspace changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from components.precompute.job import precompute, with_bundle_settings
from infra import records as r
from infra import storage
from infra.cluster import ray_session
from infra.config import Config
from infra.errors import DataError
from infra.local import valkey
from infra.logs import get_logger
from infra.service_sections import SlateStoreConfig
from infra.slate_store import SlateStore
from infra.tracking import Registered, Registry
from serving.app import LiveService, start
from serving.simulation.live import LivePlatform
from serving.simulation.loop import FROZEN, STREAMING, Tally, run
from serving.simulation.world import World, world_of
from serving.streaming import champion_trainer, past_of, timelines_of
from serving.sync import Sync

FOLDER = "simulation"


@dataclass(frozen=True)
class Stage:
    """What both arms share.

    Attributes:
        champion: of the workspace.
        version: of its bundle.
        timelines_uri: of its run.
    """

    champion: Registered
    version: str
    timelines_uri: str
    user_ids: list[str]
    item_ids: list[str]
    world: World


def stage_of(config: Config) -> Stage:
    """The workspace's champion, and the world that its users and its catalogue make.

    Raises:
        DataError: there is no champion, or its timelines are not known, or are of other items.
        StorageError: they cannot be read.
    """
    from components.retriever.bundle import load_bundle

    champion = Registry(config.tracking, config.workspace).require_champion()
    bundle = load_bundle(champion.bundle_uri)
    timelines, known = timelines_of(champion, bundle)
    if not len(timelines) or not np.array_equal(known, np.arange(len(bundle.item_ids))):
        raise DataError(
            "the champion's timelines are not known, or are of other items", where=champion.bundle_uri, mend="rankgr run, then simulate"
        )
    user_ids = timelines[r.USER_ID].to_pylist()
    past = past_of(timelines, known)
    world = world_of(
        [past(user_id) for user_id in user_ids],
        bundle.popularity,
        config.simulation,
        positive_level=bundle.config.split.positive_level,
        window=bundle.config.semantic_ids.cooccurrence_window,
        seed=config.seed,
    )
    timelines_uri = storage.join(champion.origin["sessions"], "timelines")
    return Stage(champion, bundle.version, timelines_uri, user_ids, bundle.item_ids, world)


@dataclass(frozen=True)
class Simulated:
    """What came of it.

    Attributes:
        tallies: of each arm.
        version: of the champion.
        users: of the world.
        items: of the catalogue.
    """

    tallies: dict[str, list[Tally]]
    version: str
    users: int
    items: int


def simulate(config: Config) -> Simulated:
    """Both arms, one after the other.

    Args:
        config: `simulation`, `streaming`, `gate`, `serving`, `cluster` and the workspace with its champion.

    Raises:
        DataError: as `stage_of`.
        ServiceError: a service does not start or does not answer.
    """
    stage = stage_of(config)
    found = {}
    for arm in (FROZEN, STREAMING):
        get_logger("simulate").info(arm, users=stage.world.users, items=len(stage.item_ids), hours=config.simulation.hours)
        home = storage.join(config.workspace, FOLDER, arm)
        storage.remove(home)
        with _platform(_apart(config, home, stage), stage, learns=arm == STREAMING) as platform:
            found[arm] = run(stage.world, platform, stage.user_ids, stage.item_ids, config.simulation, name=arm)
        storage.remove(home)
    return Simulated(found, stage.version, stage.world.users, len(stage.item_ids))


def _apart(config: Config, home: str, stage: Stage) -> Config:
    """The settings, with services of one's own."""
    config = with_bundle_settings(config, stage.champion.bundle_uri)
    serving = config.serving.model_copy(update={"host": "127.0.0.1", "port": 0, "tokens": []})
    tracking = config.tracking.model_copy(update={"uri": ""})
    return config.model_copy(update={"workspace": home, "serving": serving, "tracking": tracking, "slate_store": SlateStoreConfig()})


@contextmanager
def _platform(config: Config, stage: Stage, *, learns: bool) -> Iterator[LivePlatform]:
    """A service that shows the champion's slates, and what keeps it learning."""
    uri, version, simulation = stage.champion.bundle_uri, stage.version, config.simulation
    with ExitStack() as stack:
        redis_url = stack.enter_context(valkey(storage.join(config.workspace, "valkey")))
        stack.enter_context(ray_session(config.cluster))
        precompute(config, uri, stage.timelines_uri, redis_url, version)
        url = stack.enter_context(start(config, uri, redis_url, version=version))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        trainer = sync = None
        if learns:
            registry = _own_registry(config, stage.champion)
            trainer = stack.enter_context(champion_trainer(config, registry, redis_url, storage.join(config.workspace, "streaming")))
            store = stack.enter_context(SlateStore.of(config.slate_store, redis_url))
            size = config.decoding.slate_size
            service = stack.enter_context(closing(LiveService(config, redis_url)))
            sync = Sync(service, store, _champion_of(registry), bundle_uri=uri, version=version, slate_size=size)
        size = min(simulation.slate_size, config.decoding.slate_size)
        yield LivePlatform(client, slate_size=size, patience_s=config.serving.deadline_s, trainer=trainer, sync=sync)


def _champion_of(registry: Registry) -> Any:
    def champion() -> str | None:
        found = registry.champion()
        return found.bundle_uri if found else None

    return champion


def _own_registry(config: Config, champion: Registered) -> Registry:
    """A registry with the champion alone."""
    registry, origin = Registry(config.tracking, config.workspace), champion.origin
    number = registry.register(champion.bundle_uri, evaluation=champion.evaluation, metrics={}, params={}, files={}, origin=origin)
    registry.promote(number)
    return registry
