"""Blocks of a catalogue encoded by Ray actors, a few under way at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from components.semantic_ids.encoder import FeatureEncoder
from components.semantic_ids.ray_shards import check_workers, results_of, started
from components.semantic_ids.shards import Matrix

_AHEAD = 2  # blocks that an actor has: the one it works on, and the next one


class _Encoder:
    """An actor."""

    def __init__(self, encoder: FeatureEncoder) -> None:
        self._encoder = encoder

    def content(self, items: pa.RecordBatch) -> Matrix:
        return self._encoder.content(items)


def content_on_ray(encoder: FeatureEncoder, blocks: Iterable[pa.RecordBatch], *, workers: int) -> Iterator[Matrix]:
    """`encoder.content` of each block, in their order; needs a Ray session (`infra.cluster.ray_session`).

    Raises:
        ConfigError: more workers than the cluster has CPUs.
        DataError: as `content`.
    """
    import ray

    check_workers(workers)
    shared = ray.put(encoder)
    pending: deque[Any] = deque()
    with started(_Encoder, [(shared,)] * workers) as actors:
        for number, block in enumerate(blocks):
            pending.append(actors[number % workers].content.remote(block))
            if len(pending) == _AHEAD * workers:
                yield from results_of([pending.popleft()])
        while pending:
            yield from results_of([pending.popleft()])
