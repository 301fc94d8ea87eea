"""Bundle and timelines in, slates in Redis out: the batch half of serving (RankGR 3.4).

Ray Data streams the timelines, cut into parts of a few batches, through actors that hold the model; each actor publishes
what it computes, and a mark beside the slates says which parts are in. The driver writes the popular fallback, marks the
version complete and makes it active, in that order: whatever interrupts the job, readers stay with the version they had.
Run again, it goes on with the parts that are missing; a version that is complete is published anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.retriever.contract import History
from infra import errors, records, storage
from infra.catalogue import Catalogue
from infra.cluster import quiet_ray, ray_session
from infra.config import Config
from infra.errors import DataError, IntegrityError, RankGRError
from infra.logs import ProgressMeter, get_logger
from infra.redis_client import redis_url_of
from infra.slate_store import Slate, SlateStore, UserHistory
from infra.steps import Run, StepResult, code_version, content_of, job_main, run_step

STEP = "precompute"
CODE = (
    "components/precompute",
    "components/retriever",
    "components/semantic_ids/table.py",
    "components/semantic_ids/trie.py",
    "infra/catalogue.py",
    "infra/records.py",
    "infra/slate_codec.py",
    "infra/slate_store.py",
)
HISTORY_LIMIT = 2000
"""Most recent events of a user that are kept for serving."""
_PART_BATCHES, _MAX_PARTS = 4, 1000  # a task takes a second or so, and there are not too many of them

Loader = Callable[[str], Any]


def load_bundle(uri: str) -> Any:
    """The bundle at a URI; imported on call, since it brings torch."""
    from components.retriever import bundle

    return bundle.load_bundle(uri)


def history_of(items: Sequence[int], levels: Sequence[int], min_level: int) -> History:
    """The part of a timeline that counts as history: events of `min_level` and above."""
    item_array, level_array = np.asarray(items, np.int64), np.asarray(levels, np.int64)
    kept = level_array >= min_level
    return History(item_array[kept], level_array[kept])


def slates_of(
    bundle: Any,
    user_ids: Sequence[str],
    histories: Sequence[History],
    *,
    k: int,
    exclude_seen: bool,
    recommender: Any,
    fresh: Collection[str] = (),
) -> list[Slate]:
    """Slates of k items for some users, computed by a bundle's recommender.

    Args:
        bundle: what `load_bundle` returns.
        user_ids: one a history.
        histories: catalogue indices and levels; empty ones are answered too.
        k: items a slate.
        exclude_seen: leave out what occurs in the history.
        recommender: `bundle.recommender()`, which the caller keeps.
        fresh: users whose slates are marked as computed on request.
    """
    ranked = recommender.recommend(histories, k, exclude_seen=exclude_seen)
    now = time.time_ns() // 1_000_000
    return [
        Slate(user, tuple(bundle.item_ids[i] for i in one.items), tuple(map(float, one.scores)), bundle.version, now, user in fresh)
        for user, one in zip(user_ids, ranked, strict=True)
    ]


def precompute(
    config: Config,
    bundle_uri: str,
    timelines_uri: str,
    redis_url: str,
    version: str,
    *,
    loader: Loader = load_bundle,
    fresh: bool = False,
) -> dict[str, Any]:
    """Compute and publish the slates of all users, then make them the ones that readers see.

    What an attempt that was interrupted has published of the same version, timelines, settings and code is not done again.
    Needs a Ray session (`infra.cluster.ray_session`).

    Args:
        config: `decoding`, `retriever.history_min_level`, `serving.precompute_actors` and `slate_store` are used.
        bundle_uri: the released model.
        timelines_uri: folder of timeline shards (`records.TIMELINES`).
        redis_url: where the slates go.
        version: the bundle's version, under which they are published.
        loader: how an actor loads the bundle.
        fresh: begin anew, whatever was published.

    Returns:
        version, users, those of them that an earlier attempt had published, slate size, seconds, users per second of this
        attempt, and the versions that were dropped.

    Raises:
        DataError: no timelines.
        IntegrityError: the bundle has another version.
        ServiceError: Redis does not answer.
    """
    parts = _parts(timelines_uri, config.decoding.users_per_batch)
    users, job = sum(one["rows"] for one in parts), _job(config, timelines_uri, parts)
    catalogue = Catalogue(bundle_uri)
    started = time.monotonic()
    with SlateStore.of(config.slate_store, redis_url) as store:
        store.ping()
        settings = {"config_json": config.to_json(), "bundle_uri": bundle_uri, "redis_url": redis_url, "version": version, "loader": loader}
        if fresh:
            store.forget_parts(version)
        done = store.parts(version, job)
        already = published = sum(done.values())
        if done:
            get_logger(STEP).info("goes on where another attempt stopped", users=already, parts=f"{len(done)}/{len(parts)}")
        meter = ProgressMeter(users, step=STEP, unit="users", already=already)
        try:
            missing = [one for one in parts if one["part"] not in done]
            for count in _publish_all(missing, config.serving.precompute_actors, {**settings, "job": job}):
                published += count
                meter.advance(count)
        finally:
            meter.close()
        if published != users:
            raise IntegrityError(f"{published} of {users} users were published", where=timelines_uri, mend="run the step again")
        dropped = _activate(store, version, published, catalogue.popular(config.decoding.slate_size, version))
    seconds = time.monotonic() - started
    get_logger("precompute").info("slates are active", version=version, users=published, dropped=dropped or None)
    return {
        "version": version,
        "users": published,
        "users_of_earlier_attempts": already,
        "slate_size": config.decoding.slate_size,
        "publish_seconds": round(seconds, 2),
        "users_per_second": round((published - already) / seconds, 1),
        "dropped": dropped,
    }


def _activate(store: SlateStore, version: str, users: int, popular: Slate) -> list[str]:
    """Let readers see a version that is complete; returns the versions that were dropped."""
    store.publish_fallback(version, popular)
    store.complete(version, users=users)
    store.activate(version)
    store.forget_parts(version)
    return store.drop_old()


def _parts(timelines_uri: str, batch: int) -> list[dict[str, Any]]:
    """Runs of users that a task handles, each with its name, cut from the timeline files by what their Parquet footers say."""
    names = [name for name in storage.list_files(timelines_uri, ".parquet") if name.rpartition("/")[2].startswith("part-")]
    fs, path = storage.filesystem(timelines_uri)
    counts = {}
    for name in names:
        with storage.storage_errors(timelines_uri), fs.open(storage.join(path, name), "rb") as stream:
            counts[storage.join(timelines_uri, name)] = int(pq.read_metadata(stream).num_rows)
    users = sum(counts.values())
    if not users:
        raise DataError("there are no timelines", where=timelines_uri, mend="run the sessions step first")
    step = max(batch * _PART_BATCHES, users // _MAX_PARTS)
    return [
        {"part": f"{shard.rpartition('/')[2]}:{start}", "shard": shard, "start": start, "rows": min(step, rows - start)}
        for shard, rows in counts.items()
        for start in range(0, rows, step)
    ]


def _job(config: Config, timelines_uri: str, parts: Sequence[Mapping[str, Any]]) -> str:
    """What is published beside the bundle: timelines, as their storage tells versions of files apart, settings and code."""
    fs, _ = storage.filesystem(timelines_uri)
    with storage.storage_errors(timelines_uri):
        files = {shard: str(fs.checksum(storage.filesystem(shard)[1])) for shard in {one["shard"] for one in parts}}
    settings = [config.decoding.model_dump(), config.retriever.history_min_level]
    return storage.hash_json([files, list(parts), settings, code_version(CODE)])[:16]


def _publish_all(parts: Sequence[Mapping[str, Any]], actors: int, settings: Mapping[str, Any]) -> Iterator[int]:
    """Run the actors over some parts; yields how many users were published as parts are done."""
    if not parts:
        return
    import ray.data

    quiet_ray(errors_too=True)
    counts = ray.data.from_items(list(parts), override_num_blocks=len(parts)).map_batches(
        Publisher,
        fn_constructor_kwargs=dict(settings),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
        num_cpus=1,
    )
    for row in counts.iter_rows():
        if row["error"]:
            errors.raise_described(json.loads(row["error"]))
        yield int(row["users"])


class Publisher:
    """Actor that holds the model and a connection to Redis, both opened at its first part.

    Not in the constructor, and errors of ours are returned as values: what Ray raises in the driver is in its own
    words, after attempts to restart the actor.
    """

    def __init__(self, config_json: str, bundle_uri: str, redis_url: str, version: str, job: str, loader: Loader) -> None:
        self.config, self.version, self.job = Config.from_json(config_json), version, job
        self.bundle_uri, self.redis_url, self.loader = bundle_uri, redis_url, loader

    @cached_property
    def bundle(self) -> Any:
        """The bundle, whose version is the one to publish."""
        bundle = self.loader(self.bundle_uri)
        if bundle.version != self.version:
            raise IntegrityError(
                f"the bundle has version {bundle.version}, not {self.version}",
                where=self.bundle_uri,
                mend="publish a bundle under its own version",
            )
        return bundle

    @cached_property
    def recommender(self) -> Any:
        """The bundle's recommender."""
        return self.bundle.recommender()

    @cached_property
    def store(self) -> SlateStore:
        """Where the slates go."""
        return SlateStore.of(self.config.slate_store, self.redis_url)

    @lru_cache(maxsize=1)  # noqa: B019 - an actor lives as long as the job
    def _shard(self, uri: str) -> pa.Table:
        return storage.read_table(uri).select([records.USER_ID, "items", "levels", "timestamps"])

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Publish slates and histories of one part, then mark it; returns for how many users, or the error."""
        try:
            rows = self._shard(str(batch["shard"][0])).slice(int(batch["start"][0]), int(batch["rows"][0]))
            size = self.config.decoding.users_per_batch
            published = sum(self._publish(rows.slice(start, size)) for start in range(0, rows.num_rows, size))
            self.store.mark_part(self.version, self.job, str(batch["part"][0]), published)
        except RankGRError as error:
            return {"users": [0], "error": [json.dumps(errors.describe(error))]}
        return {"users": [published], "error": [""]}

    def _publish(self, rows: pa.Table) -> int:
        user_ids: list[str] = rows[records.USER_ID].to_pylist()
        pairs = zip(rows["items"].to_pylist(), rows["levels"].to_pylist(), strict=True)
        histories = [history_of(items, levels, self.config.retriever.history_min_level) for items, levels in pairs]
        decoding = self.config.decoding
        slates = slates_of(
            self.bundle, user_ids, histories, k=decoding.slate_size, exclude_seen=decoding.exclude_seen, recommender=self.recommender
        )
        until = [max(times, default=0) for times in rows["timestamps"].to_pylist()]
        self.store.publish_histories(self._readable(*one) for one in zip(user_ids, histories, until, strict=True))
        return self.store.publish(self.version, slates)

    def _readable(self, user_id: str, history: History, until: int) -> UserHistory:
        items, levels = history.items[-HISTORY_LIMIT:], history.levels[-HISTORY_LIMIT:]
        return UserHistory(user_id, tuple(self.bundle.item_ids[i] for i in items), tuple(levels.tolist()), until)


def step(run: Run, sessions: str, release: str) -> StepResult:
    """The step `precompute`: the released bundle's slates for all users, made the active ones.

    A finished step whose slates are gone from Redis (expired, another server) is done again.
    """
    bundle_uri, version = storage.join(release, "bundle"), str(storage.open_committed(release, verify=False).metadata["version"])
    config = with_bundle_settings(run.config, bundle_uri)
    redis_url = redis_url_of(config.slate_store)
    with SlateStore.of(config.slate_store, redis_url) as store:
        is_active = store.active_version() == version and store.count(version) >= (store.users(version) or 1)

    def work(_: str) -> dict[str, Any]:
        with ray_session(config.cluster):
            return precompute(config, bundle_uri, storage.join(sessions, "timelines"), redis_url, version, fresh=run.fresh)

    settings = {
        "decoding": config.decoding.model_dump(),
        "slate_store": config.slate_store.model_dump(),
        "history_min_level": config.retriever.history_min_level,
    }
    inputs = {"sessions": content_of(sessions), "release": content_of(release)}
    return run_step(replace(run, fresh=run.fresh or not is_active), STEP, work, settings=settings, inputs=inputs, code=CODE)


def with_bundle_settings(config: Config, bundle_uri: str) -> Config:
    """A configuration that decodes as the bundle's model was judged; what a command says of services stays."""
    trained = Config.from_json(storage.read_bytes(storage.join(bundle_uri, "config.json")).decode())
    return config.model_copy(update={name: getattr(trained, name) for name in ("decoding", "retriever", "training", "semantic_ids")})


if __name__ == "__main__":
    job_main(step, ("sessions", "release"))
