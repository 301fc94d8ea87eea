"""What a catalogue takes before it is quantized: passes over the items, memory, arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from components.semantic_ids.kmeans import sample_size
from components.semantic_ids.shards import BLOCK, KEPT_BYTES, ROWS
from infra.sections import SemanticIdConfig

_FLOAT, _MIB = 4, 2**20


@dataclass(frozen=True)
class Plan:
    """Counts and bytes.

    Attributes:
        passes: over all items; each is one matrix product with the codewords. Balanced levels end with a few passes more over the
            items of crowded codewords, and many where very many items are exactly alike.
        shard_rows: items that are in memory at a time, a worker.
        worker_bytes: of a worker: its shard twice, distances, codes, partial sums; or all its shards, where those are kept.
        driver_bytes: of who leads: the features, which it joins and hands out, codebooks, sums of each worker, codes.
        read_bytes: by all workers together, over all passes.
        tera_operations: multiplications and additions.
    """

    passes: int
    shard_rows: int
    worker_bytes: int
    driver_bytes: int
    read_bytes: int
    tera_operations: float

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each, for people."""
        return [
            ("passes over the items", f"{self.passes:,}"),
            ("items in memory at a time, a worker", f"{self.shard_rows:,}"),
            ("memory of a worker", f"{self.worker_bytes / _MIB:,.0f} MiB"),
            ("memory of the driver: features and codebooks", f"{self.driver_bytes / _MIB:,.0f} MiB"),
            ("read by all workers, all passes", f"{self.read_bytes / _MIB:,.0f} MiB"),
            ("arithmetic", f"{self.tera_operations:,.1f} TFLOP"),
        ]


def plan_of(items: int, width: int, settings: SemanticIdConfig) -> Plan:
    """Plan residual k-means; fewer passes are done where codes settle.

    Args:
        items: N.
        width: D.
        settings: levels, codes, iterations, workers.
    """
    workers, codes, levels = max(settings.workers, 1), settings.codes, settings.levels
    passes = levels * (settings.iterations + 2)  # one draws the sample that codewords start from, one assigns in the end
    shard_rows = min(items, ROWS)
    own = -(-items // workers)
    kept = not settings.workers or own * width * _FLOAT <= KEPT_BYTES
    rows = own if kept else 2 * shard_rows
    worker = _FLOAT * (rows * width + own * (levels + 2) + BLOCK * codes + 3 * codes * width)
    driver = _FLOAT * (items * (width + levels) + codes * width * (levels + 2 * workers) + sample_size(items, codes) * width)
    read = 0 if kept else passes * items * width * _FLOAT
    return Plan(passes, shard_rows, worker, driver, read, 2e-12 * passes * items * codes * width)
