"""The streaming trainer put together: champion, timelines of its run, stream and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from components.retriever.contract import History
from infra import records as r
from infra import storage
from infra.config import Config
from infra.event_stream import EventStream, Limits
from infra.local import only_one
from infra.logs import get_logger
from infra.metrics import TRAINER, Meter, exported
from infra.redis_client import access_of
from infra.steps import Run
from infra.tracking import Registered, Registry

if TYPE_CHECKING:  # what brings torch is imported where the trainer starts
    from torch import Tensor

    from components.retriever.bundle import Bundle
    from components.retriever.packing import Row
    from serving.timelines import Past
    from serving.trainer import StreamTrainer

_FROM_BUNDLE = ("seed", "split", "semantic_ids", "retriever", "training", "decoding", "evaluation")
_HOUR_MS = 3_600_000


def train_on_stream(config: Config, redis_url: str, *, until_idle: float | None = None, max_events: int | None = None) -> None:
    """Train the champion on what comes; begins anew where another model becomes champion.

    Args:
        config: services, `streaming` and `gate`; the rest is as the champion was trained.
        redis_url: where the stream is.
        until_idle: as for `StreamTrainer.run`.
        max_events: as for `StreamTrainer.run`.

    Raises:
        DataError: there is no champion, or it has no bundle.
        StorageError: the timelines that it came from cannot be read.
        ServiceError: another trainer is running in this workspace; the port for metrics is taken; Redis or MLflow do not answer.
        TrainingError: as for `StreamTrainer.run`.
    """
    folder = storage.join(config.workspace, "streaming")
    registry, meter, settings = Registry(config.tracking, config.workspace), Meter(TRAINER), config.streaming
    with (
        only_one(folder, "streaming trainer"),
        exported(meter, settings.metrics_host, settings.metrics_port, setting="streaming.metrics_port"),
    ):
        while True:
            with champion_trainer(config, registry, redis_url, folder, meter) as trainer:
                if trainer.run(until_idle=until_idle, max_events=max_events):
                    return
            get_logger("stream").warning("another model became champion")


@contextmanager
def champion_trainer(
    config: Config, registry: Registry, redis_url: str, folder: str, meter: Meter | None = None
) -> Iterator[StreamTrainer]:
    """The trainer of the registry's champion, which releases what passes its gate there.

    Args:
        config: as for `train_on_stream`.
        registry: of the champion.
        redis_url: where the stream is.
        folder: for its checkpoints.
        meter: counts what it does.

    Raises:
        DataError: there is no champion, or it has no bundle.
        StorageError: the timelines that it came from cannot be read.
    """
    import torch

    from components.release.job import BUNDLE
    from components.release.update import streamed_of, update_champion
    from components.retriever.bundle import load_bundle
    from components.training.online import for_stream
    from serving.checkpoints import Checkpoints
    from serving.trainer import StreamTrainer

    champion = registry.require_champion()
    bundle = load_bundle(champion.bundle_uri)
    config = config.model_copy(update={name: getattr(bundle.config, name) for name in _FROM_BUNDLE})
    torch.set_num_threads(config.training.threads_per_worker)
    timelines, known = timelines_of(champion, bundle)
    served: Registered = champion

    def release(weights: Mapping[str, Tensor], figures: Mapping[str, Mapping[str, float]]) -> Bundle | None:
        nonlocal served
        if update_champion(Run(config), registry, served, weights, figures) is None:
            return None
        now = registry.champion()
        assert now is not None
        served = now
        return load_bundle(now.bundle_uri)

    streaming, index = config.streaming, {item_id: number for number, item_id in enumerate(bundle.item_ids)}
    max_age_ms = None if streaming.max_age_hours is None else round(streaming.max_age_hours * _HOUR_MS)
    reading: dict[str, Any] = {
        "prefix": config.slate_store.prefix,
        "limits": Limits(max_age_ms=max_age_ms),
        "window": streaming.window,
        "access": access_of(config.slate_store, redis_url),
    }
    get_logger("stream").info("trains the champion", bundle=champion.bundle_uri.removesuffix(f"/{BUNDLE}"), version=bundle.version)
    with EventStream(redis_url, knows=index.__contains__, **reading) as stream:
        yield StreamTrainer(
            config,
            bundle,
            lineage=streamed_of(champion.bundle_uri),
            stream=stream,
            checkpoints=Checkpoints(storage.join(folder, "checkpoints"), streaming.checkpoints),
            past=past_of(timelines, known),
            rows=lambda: rows_of(timelines, known, for_stream(config)),
            release=release,
            meter=meter,
        )


def timelines_of(champion: Registered, bundle: Bundle) -> tuple[pa.Table, np.ndarray]:
    """Timelines that the champion came from, and the index of their items in the bundle, -1 where it has none."""
    sessions = champion.origin.get("sessions")
    if sessions is None:
        get_logger("stream").warning("the champion's timelines are not known: neither is what users did before the stream")
        return r.TIMELINES.empty_table(), np.empty(0, np.int64)
    ids = storage.read_table(storage.join(sessions, "catalogue.parquet"))[r.ITEM_ID].to_pylist()
    return storage.read_table(storage.join(sessions, "timelines")), indices_in(bundle.item_ids, ids)


def indices_in(item_ids: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Where each of the others is among the item ids; -1 where it is not."""
    index = {item_id: number for number, item_id in enumerate(item_ids)}
    return np.array([index.get(item_id, -1) for item_id in others], np.int64)


def past_of(timelines: pa.Table, known: np.ndarray) -> Past:
    """What users did, by user id.

    Args:
        timelines: TIMELINES.
        known: index of their items that is wanted; -1 leaves an item out.
    """
    row_of = {user: row for row, user in enumerate(timelines[r.USER_ID].to_pylist())}
    items, levels = timelines["items"].combine_chunks(), timelines["levels"].combine_chunks()

    def past(user_id: str) -> History:
        row = row_of.get(user_id)
        if row is None:
            return History(np.empty(0, np.int64), np.empty(0, np.int64))
        indices = known[np.array(items[row].as_py(), np.int64)]
        return History(indices[indices >= 0], np.array(levels[row].as_py(), np.int64)[indices >= 0])

    return past


def rows_of(timelines: pa.Table, known: np.ndarray, config: Config) -> Iterable[Row]:
    """What the model was trained on; nothing where its run had other items."""
    from components.training.data import training_rows

    if not np.array_equal(known, np.arange(len(known))):
        get_logger("stream").warning("the run of the champion had other items: the replay buffer begins empty")
        return []
    return training_rows(timelines, config)
