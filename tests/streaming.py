"""A streaming trainer of a tiny model on a ring of items, and a stream for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.torch import save

from components.retriever.bundle import Bundle, load_bundle, write_bundle
from components.semantic_ids.coder import FILES as CODER_FILES
from components.training.checkpoint import trained_state
from components.training.data import training_rows
from components.training.loop import build_model
from infra import records, storage
from infra.config import Config
from infra.event_stream import AsyncEventWriter, Event, EventStream, Limits
from infra.metrics import Meter
from serving.checkpoints import Checkpoints
from serving.streaming import past_of
from serving.trainer import StreamTrainer
from tests.unit.components.training.small import N_ITEMS, configuration, sids, timelines

USERS = 24


def settings(*overrides: str) -> Config:
    """Checkpoints after every step, no sync, and dropout, whose noise a restart must repeat."""
    streaming = ("events_per_step=16", "checkpoint_every_s=0", "learning_rate=0.001", "max_drift=10", "replay_rows=40", "window=64")
    return configuration("retriever.dropout=0.1", *(f"streaming.{one}" for one in streaming), *overrides)


def event(number: int, **changes: Any) -> Event:
    """User u goes on round the ring: a click and an exposure a request, told in any order of users."""
    user, step = number // 2 % USERS, number // 2 // USERS
    item = (user + 9 + step + 6 * (number % 2)) % N_ITEMS
    values = {"event_id": f"e{number}", "user_id": f"u{user}", "item_id": f"i{item}", "level": 3 - 2 * (number % 2)}
    return Event(**{**values, "timestamp_ms": 1_700_000_000_000 + number, "request_id": f"r{user}-{step}", **changes})


def append(url: str, events: Sequence[Event]) -> None:
    async def write() -> None:
        async with AsyncEventWriter(url, prefix="test") as writer:
            await writer.append(events)

    asyncio.run(write())


def write_small_bundle(folder: Path, config: Config) -> str:
    """An untrained model in a committed bundle."""
    rest = {"text": "", "category": "", "brand": "", "embedding": None, "popularity": 1}
    rows = [{"item_index": i, "item_id": f"i{i}", "title": f"Title {i}", **rest} for i in range(N_ITEMS)]
    for name in CODER_FILES:
        storage.write_bytes(str(folder / "coder" / name), b"what gave the items their SIDs")
    weights = save(trained_state(build_model(config, sids())))
    catalogue = pa.Table.from_pylist(rows, schema=records.CATALOGUE)
    uri = str(folder / "bundle")
    write_bundle(uri, config=config, weights=weights, sids=sids(), catalogue=catalogue, coder=str(folder / "coder"), metadata={})
    return uri


def trainer(
    folder: Path,
    url: str,
    config: Config,
    *,
    bundle_uri: str = "",
    release: Any = None,
    lineage: str = "first",
    meter: Meter | None = None,
) -> StreamTrainer:
    """A trainer with its checkpoints in the folder."""
    bundle: Bundle = load_bundle(bundle_uri or str(folder / "bundle"))
    knows = set(bundle.item_ids).__contains__
    stream = EventStream(url, prefix="test", knows=knows, limits=Limits(max_age_ms=None), window=config.streaming.window)
    return StreamTrainer(
        config,
        bundle,
        lineage=lineage,
        stream=stream,
        checkpoints=Checkpoints(str(folder / "checkpoints"), config.streaming.checkpoints),
        past=past_of(timelines(), np.arange(N_ITEMS)),
        rows=lambda: training_rows(timelines(), config),
        release=release or (lambda *_: None),
        meter=meter,
    )
