"""Shards on Ray actors: each actor reads its own files, one at a time, and hands back partial sums."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.semantic_ids.shards import KEPT_BYTES, Ints, Matrix, Shard, add_up, picked
from infra import storage
from infra.errors import ConfigError, DataError, ServiceError

_HEADER = 256  # bytes of a file that are sure to tell its shape


def write_blocks(blocks: Iterable[Matrix], uri: str) -> list[str]:
    """Write rows_nD as one file a block, without pickle; returns their URIs."""
    names = []
    for number, block in enumerate(blocks):
        sink = io.BytesIO()
        np.save(sink, np.ascontiguousarray(block, np.float32), allow_pickle=False)
        names.append(storage.join(uri, f"block-{number:05}.npy"))
        storage.write_bytes(names[-1], sink.getvalue())
    return names


def read_block(uri: str) -> Matrix:
    """Inverse of `write_blocks` for one file."""
    return np.asarray(np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False), np.float32)


class _Worker:
    """An actor: some consecutive shards."""

    def __init__(self, uris: Sequence[str], keep: bool) -> None:
        self._shards = [Shard(lambda uri=uri: read_block(uri), keep=keep) for uri in uris]  # type: ignore[misc]

    def add_up(self, method: str, *arguments: Any) -> tuple[Any, ...]:
        return add_up(getattr(shard, method)(*arguments) for shard in self._shards)

    def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(shard, method)(*own) for shard, own in zip(self._shards, arguments, strict=True)]

    def every(self, method: str, *arguments: Any) -> list[Any]:
        return [getattr(shard, method)(*arguments) for shard in self._shards]

    def one(self, shard: int, method: str, *arguments: Any) -> Any:
        return getattr(self._shards[shard], method)(*arguments)

    def together(self, compute: Callable[[Matrix], Any], rows: Mapping[int, Ints]) -> Any:
        return compute(picked(self._shards, rows))


@dataclass
class RayShards:
    """Files of rows on Ray actors; make one with `ray_shards`.

    Attributes:
        sizes: rows of each file.
    """

    sizes: Ints
    _actors: Sequence[Any]
    _counts: Sequence[int]

    def add_up(self, method: str, *arguments: Any) -> tuple[Any, ...]:
        """Sums over shards, in each actor first."""
        shared = _shared(arguments)
        return add_up(results_of([actor.add_up.remote(method, *shared) for actor in self._actors]))

    def each(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """A call for each."""
        rest = iter(arguments)
        own = [list(itertools.islice(rest, count)) for count in self._counts]
        calls = [actor.each.remote(method, part) for actor, part in zip(self._actors, own, strict=True)]
        return list(itertools.chain.from_iterable(results_of(calls)))

    def every(self, method: str, *arguments: Any) -> list[Any]:
        """The same call for all."""
        shared = _shared(arguments)
        return list(itertools.chain.from_iterable(results_of([actor.every.remote(method, *shared) for actor in self._actors])))

    def one(self, shard: int, method: str, *arguments: Any) -> Any:
        """A call for one."""
        ends = np.cumsum(self._counts)
        actor = int(np.searchsorted(ends, shard, side="right"))
        return results_of([self._actors[actor].one.remote(shard - int(ends[actor] - self._counts[actor]), method, *arguments)])[0]

    def together(self, compute: Callable[[Matrix], Any], rows: Mapping[int, Ints]) -> list[Any]:
        """A call for each actor that has such rows; features do not travel."""
        (shared,) = _shared([compute])
        ends = np.cumsum(self._counts)
        calls = []
        for actor, first, end in zip(self._actors, ends - self._counts, ends, strict=True):
            own = {shard - int(first): numbers for shard, numbers in rows.items() if first <= shard < end}
            if own:
                calls.append(actor.together.remote(shared, own))
        return results_of(calls)


@contextmanager
def ray_shards(uris: Sequence[str], *, workers: int) -> Iterator[RayShards]:
    """Actors for the files of `write_blocks`; they end with the context. Needs a Ray session (`infra.cluster.ray_session`).

    Files of `shards.ROWS` rows are cut as a process of its own cuts them: both then find the same codes.

    Raises:
        ConfigError: more workers than the cluster has CPUs.
        DataError: files of rows of different widths.
    """
    check_workers(workers)
    shapes = [_shape(uri) for uri in uris]
    if len({width for _, width in shapes}) > 1:
        raise DataError("files of features have different widths", where=uris[0], mend="write them anew")
    sizes = np.array([rows for rows, _ in shapes])
    parts = [part for part in np.array_split(np.arange(len(uris)), min(workers, len(uris))) if len(part)]
    keep = [int(sizes[part].sum()) * shapes[0][1] * 4 <= KEPT_BYTES for part in parts]
    with started(_Worker, [([uris[i] for i in part], kept) for part, kept in zip(parts, keep, strict=True)]) as actors:
        yield RayShards(sizes, actors, [len(part) for part in parts])


def _shape(uri: str) -> tuple[int, int]:
    head = io.BytesIO(storage.read_bytes(uri, first=_HEADER))
    np.lib.format.read_magic(head)
    (rows, width), _, _ = np.lib.format.read_array_header_1_0(head)
    return int(rows), int(width)


def check_workers(workers: int) -> None:
    """Refuse workers that would wait for a CPU for ever.

    Raises:
        ConfigError: more workers than the cluster has CPUs.
    """
    import ray

    free = int(ray.cluster_resources().get("CPU", 0))
    if workers > free:
        raise ConfigError(
            f"{workers} workers need as many CPUs, the cluster has {free}", where="semantic_ids.workers", mend=f"set it to {free} or less"
        )


@contextmanager
def started(kind: type, arguments: Sequence[tuple[Any, ...]]) -> Iterator[list[Any]]:
    """An actor for each tuple of arguments, on a CPU of its own; they end with the context."""
    import ray

    remote = ray.remote(num_cpus=1)(kind)
    actors = [remote.remote(*own) for own in arguments]
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


def _shared(arguments: Sequence[Any]) -> list[Any]:
    """Put once what every actor reads."""
    import ray

    return [ray.put(argument) for argument in arguments]


def results_of(calls: Sequence[Any]) -> list[Any]:
    """What calls of actors return; an error of ours is raised as it is.

    Raises:
        ServiceError: an actor died.
    """
    import ray

    from infra.cluster import unwrap

    try:
        return list(ray.get(list(calls)))
    except Exception as error:
        ours = unwrap(error)
        if ours is error and isinstance(error, ray.exceptions.RayActorError):
            mend = "run again; if memory was short, set more workers on more nodes, or fewer on this one"
            raise ServiceError(f"a worker died: {error}", where="semantic_ids.workers", mend=mend) from error
        raise ours from error
