"""Simulated users with tastes of their own; a model that goes on learning follows when these change. A real stream and trainer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from components.retriever.bundle import Bundle
from components.retriever.contract import History
from components.training.checkpoint import trained_state
from components.training.data import plan_batches, training_rows
from components.training.loop import build_average, build_model, build_optimizer, first_state, run_epochs
from infra import records
from infra.event_stream import Event, EventStream
from infra.records import Level
from infra.service_sections import SimulationConfig
from serving.checkpoints import Checkpoints
from serving.simulation.loop import FROZEN, STREAMING, Shown, Tally, events_of, run
from serving.simulation.report import render_html, summary
from serving.simulation.world import Visit, World, world_of
from serving.streaming import past_of
from serving.trainer import StreamTrainer
from tests.streaming import append
from tests.unit.components.training.small import configuration

GROUPS, A_GROUP, USERS = 4, 10, 60
ITEMS = GROUPS * A_GROUP
USER_IDS, ITEM_IDS = [f"u{user}" for user in range(USERS)], [f"i{item}" for item in range(ITEMS)]
SIMULATION = SimulationConfig(
    hours=12, shift_hour=3, visits_per_hour=USERS, slate_size=5, groups=GROUPS, position_bias=0.2, click_rate=0.9, found_per_visit=2.0
)
CONFIG = configuration(
    "semantic_ids.codes=8",
    "training.epochs=20",
    "training.learning_rate=0.01",
    "decoding.exclude_seen=false",
    "decoding.beams=[8,40]",
    "decoding.lambdas=[8,8]",
    *(
        f"streaming.{one}"
        for one in (
            "learning_rate=0.005",
            "events_per_step=16",
            "ema_decay=0.9",
            "sync_every_s=0",
            "gate_users=20",
            "checkpoint_every_s=3600",
            "max_drift=10",
        )
    ),
)


def small_world(settings: SimulationConfig = SIMULATION) -> World:
    """Each user likes one group of items, and in each group some items better than others."""
    tastes = np.full((USERS, GROUPS), 0.1)
    tastes[np.arange(USERS), np.arange(USERS) % GROUPS] = 1.0
    appeal = np.tile(np.linspace(0.1, 1, A_GROUP) ** 2, GROUPS)
    return World(np.arange(ITEMS) // A_GROUP, tastes, appeal, settings, seed=0)


def timelines_of(world: World) -> pa.Table:
    """What the users clicked before the simulation begins."""
    rows = []
    for user in range(USERS):
        weights = world.attraction(user, 0)
        items = np.random.default_rng(user).choice(ITEMS, 12, p=weights / weights.sum()).tolist()
        rest = {"timestamps": list(range(12)), "requests": list(range(12)), "phases": [0] * 12}
        rows.append({"user_id": USER_IDS[user], "items": items, "levels": [Level.CLICK] * 12, **rest})
    return pa.Table.from_pylist(rows, schema=records.TIMELINES)


def trained_bundle(timelines: pa.Table) -> Bundle:
    """A model of these timelines."""
    sids = [
        {"item_index": i, "item_id": ITEM_IDS[i], "codes": [2 * (i // A_GROUP) + i % 2, i % A_GROUP // 2], "popularity": 1}
        for i in range(ITEMS)
    ]
    rest = {"text": "", "category": "", "brand": "", "embedding": None, "popularity": 1}
    items = [{"item_index": i, "item_id": ITEM_IDS[i], "title": "", **rest} for i in range(ITEMS)]
    table = pa.Table.from_pylist(sids, schema=records.SIDS)
    rows, model = training_rows(timelines, CONFIG), build_model(CONFIG, table)
    average = build_average(model, CONFIG)
    optimizer, schedule = build_optimizer(model, CONFIG, plan_batches(rows, CONFIG).steps)
    for _ in run_epochs(model, average, rows, optimizer, schedule, CONFIG, first_state()):
        pass
    return Bundle("v0", CONFIG, table, pa.Table.from_pylist(items, schema=records.CATALOGUE), trained_state(model))


class DirectPlatform:
    """The service without HTTP: the model answers at once from what users did."""

    def __init__(self, bundle: Bundle, timelines: pa.Table, url: str) -> None:
        self.bundle, self.url, self.trainer, self.told = bundle, url, None, 0
        self.past = past_of(timelines, np.arange(ITEMS))
        self.histories = {user_id: self.past(user_id) for user_id in USER_IDS}
        self.recommender = bundle.recommender()

    @contextmanager
    def learning(self, folder: Path, timelines: pa.Table) -> Iterator[DirectPlatform]:
        with EventStream(self.url, prefix="test") as stream:
            self.trainer = StreamTrainer(
                CONFIG,
                self.bundle,
                lineage="first",
                stream=stream,
                checkpoints=Checkpoints(str(folder), 2),
                past=self.past,
                rows=lambda: training_rows(timelines, CONFIG),
                release=self.release,
            )
            yield self

    def release(self, weights: Mapping[str, torch.Tensor], _: object) -> Bundle:
        self.bundle = replace(self.bundle, version=f"v{int(self.bundle.version[1:]) + 1}", weights=dict(weights))
        return self.bundle

    def slates(self, user_ids: Sequence[str]) -> list[Shown]:
        ranked = self.recommender.recommend([self.histories[user_id] for user_id in user_ids], 5, exclude_seen=False)
        return [
            Shown(user_id, tuple(ITEM_IDS[item] for item in one.items), self.version, "fresh")
            for user_id, one in zip(user_ids, ranked, strict=True)
        ]

    def take(self, events: Sequence[Event]) -> None:
        self.told += len(events)
        for event in events:
            before = self.histories[event.user_id]
            item = ITEM_IDS.index(event.item_id)
            self.histories[event.user_id] = History(np.append(before.items, item), np.append(before.levels, event.level))
        if self.trainer is not None:
            append(self.url, events)

    version = "v0"

    def end_hour(self) -> None:
        told, self.told = self.told, 0
        if self.trainer is not None:
            self.trainer.run(max_events=told)
            self.recommender, self.version = self.bundle.recommender(), self.bundle.version


def test_streaming_follows_a_change_of_taste_that_a_frozen_model_does_not(valkey: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    world = small_world()
    timelines = timelines_of(world)
    bundle = trained_bundle(timelines)
    found = {FROZEN: run(world, DirectPlatform(bundle, timelines, valkey), USER_IDS, ITEM_IDS, SIMULATION, name=FROZEN)}
    with DirectPlatform(bundle, timelines, valkey).learning(tmp_path, timelines) as platform:
        found[STREAMING] = run(world, platform, USER_IDS, ITEM_IDS, SIMULATION, name=STREAMING)

    figures = summary(found, SIMULATION)
    frozen, streaming = figures[FROZEN], figures[STREAMING]
    assert frozen["ctr_after"] < 0.75 * frozen["ctr_before"]  # the change hurts
    assert abs(streaming["ctr_before"] / frozen["ctr_before"] - 1) < 0.25
    assert streaming["versions"] > 2
    assert frozen["versions"] == 1
    assert streaming["ctr_second_half_after"] > 1.2 * frozen["ctr_second_half_after"]
    assert figures["after_z"] > 3


def test_users_have_the_same_luck_whatever_they_are_shown() -> None:
    world, other = small_world(), small_world()
    assert world.visit(3, 1, [30, 31, 32]) == other.visit(3, 1, [30, 31, 32])
    assert world.visit(3, 1, [30, 31, 32]).found == world.visit(3, 1, [0, 1, 2]).found
    assert world.visitors(2).tolist() == other.visitors(2).tolist() != world.visitors(3).tolist()


def test_an_item_comes_into_view_by_its_rank_and_is_clicked_by_taste() -> None:
    settings = SIMULATION.model_copy(update={"position_bias": 1.0, "visits_per_hour": USERS})
    world = small_world(settings)
    best, worst = [9, 8, 7, 6, 5], [20, 21, 22, 23, 24]  # user 0 likes the first group, and its last items best
    visits = {
        name: [world.visit(0, hour, slate) for hour in range(3) for _ in range(1)] for name, slate in (("best", best), ("worst", worst))
    }
    seen = [world.visit(user, hour, best) for user in range(0, USERS, GROUPS) for hour in range(3)]
    in_view = [sum(any(item == one for item, _ in visit.views) for visit in seen) for one in best]
    assert in_view[0] == len(seen)  # the first always
    assert in_view[4] < 0.5 * len(seen)
    assert sum(visit.clicks for visit in visits["best"]) > sum(visit.clicks for visit in visits["worst"])


def test_at_the_shift_tastes_turn_to_the_next_group_and_other_items_come_into_fashion() -> None:
    world = small_world(SIMULATION.model_copy(update={"shift_share": 1.0}))
    before, after = world.attraction(0, 2), world.attraction(0, 3)
    assert before.argmax() // A_GROUP == 0
    assert after.argmax() // A_GROUP == 1
    assert sorted(after[A_GROUP : 2 * A_GROUP]) == sorted(before[:A_GROUP])  # the same appeal, dealt anew
    calm = small_world(SIMULATION.model_copy(update={"shift_share": 0.0}))
    assert np.array_equal(calm.attraction(0, 2), calm.attraction(0, 8))


def test_a_world_is_made_of_what_users_did() -> None:
    clicks = [[0, 1, 2, 3], [1, 2, 3, 0], [2, 0, 3, 1], [4, 5, 6, 7], [5, 6, 7, 4], [7, 4, 5, 6]] * 3
    histories = [History(np.array(items), np.full(4, Level.CLICK)) for items in clicks]
    popularity = np.array([8, 4, 2, 1, 1, 2, 4, 8])
    world = world_of(histories, popularity, SIMULATION.model_copy(update={"groups": 2}), positive_level=3, window=4, seed=0)
    assert world.attraction(0, 0)[:4].sum() > world.attraction(0, 0)[4:].sum()
    assert world.attraction(0, 0).argmax() == 0
    assert world.attraction(3, 0).argmax() == 7


def test_what_came_into_view_is_one_request_and_what_was_found_others() -> None:
    events = events_of(Shown("ann", ("i1", "i2"), "v0", "fresh"), Visit([(1, Level.CLICK), (2, Level.EXPOSURE)], [7]), 4, ITEM_IDS)
    assert [(event.item_id, event.level, event.request_id) for event in events] == [
        ("i1", 3, "4-ann"),
        ("i2", 2, "4-ann"),
        ("i7", 3, "4-ann-found-0"),
    ]
    assert len({event.event_id for event in events}) == 3


def test_the_report_says_how_far_each_arm_fell_and_when_it_came_back() -> None:
    settings = SIMULATION.model_copy(update={"hours": 8, "shift_hour": 2})

    def tallies(rates: Sequence[int], version: str) -> list[Tally]:
        return [Tally(hour, f"{version}{hour // 4}", 10, 9, 100, clicks, 1) for hour, clicks in enumerate(rates)]

    found = {FROZEN: tallies([40, 40, 20, 20, 20, 20, 20, 20], "f<>"), STREAMING: tallies([40, 40, 20, 30, 36, 36, 40, 40], "s")}
    figures = summary(found, settings)
    assert (figures[FROZEN]["ctr_before"], figures[FROZEN]["ctr_after"], figures[FROZEN]["recovered_after_h"]) == (0.4, 0.2, None)
    assert (figures[STREAMING]["ctr_second_half_after"], figures[STREAMING]["recovered_after_h"]) == (0.3867, 2)
    assert figures["after_gain"] == round((202 / 600) / 0.2 - 1, 4)
    page = render_html(found, settings, {"champion": "f<>0"})
    assert "<svg" in page and "f&lt;&gt;0" in page and "f<>0" not in page
    assert not re.search(r"""(src|href)=["']https?://""", page)
