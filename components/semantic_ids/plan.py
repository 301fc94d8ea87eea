"""What a catalogue takes before it is quantized: passes over the items, memory, files, arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from components.semantic_ids.kmeans import MOST_ROWS, sample_size
from components.semantic_ids.shards import BLOCK, KEPT_BYTES, ROWS
from infra.sections import SemanticIdConfig

_FLOAT, _MIB = 4, 2**20
_READING = 64 << 20  # buffers of Parquet
_BLOCKS = 8  # of features under way: read, scaled, weighted, joined
_A_MOVE = 400  # bytes of a row that balance may move: where to, at what cost
_AN_ITEM, _A_CODE = 40, 12  # bytes: id or sorted SID, popularity; codes of the fit, codes found, codes without collisions
_SVDS = {"pmi": 5, "cosine": 6, "adapter": 6}  # matrices of the width `collaborative_dim` at a time


@dataclass(frozen=True)
class Plan:
    """Counts and bytes.

    Attributes:
        passes: over all items; each is one matrix product with the codewords. Balanced levels end with a few passes more over the
            items of crowded codewords, and many where very many items are exactly alike. Of an RQ-VAE: the epochs, one more in each
            that revives codewords, and three for scale, first codewords and codes.
        shard_rows: items that are in memory at a time, a worker.
        worker_bytes: of a worker: its shard twice, distances, codes, partial sums; or all its shards, where those are kept. Without
            `workers`, of the process that leads, beside the next. Of an RQ-VAE also weights and what its part of a minibatch takes;
            not PyTorch itself.
        driver_bytes: of who leads: a few blocks of features, codebooks, sums of each worker, rows that balance moves, ids and codes.
            Not the vocabulary of TF-IDF and the timelines.
        signal_bytes: of who leads, while a collaborative signal is fitted to timelines; 0 if none is asked for.
        file_bytes: while this runs: features, without the signal too where there is one, and once more for the workers.
        read_bytes: by all workers together, over all passes.
        tera_operations: multiplications and additions.
    """

    passes: int
    shard_rows: int
    worker_bytes: int
    driver_bytes: int
    signal_bytes: int
    file_bytes: int
    read_bytes: int
    tera_operations: float

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each, for people."""
        return [
            ("passes over the items", f"{self.passes:,}"),
            ("items in memory at a time, a worker", f"{self.shard_rows:,}"),
            ("memory of a worker", _mib(self.worker_bytes)),
            ("memory of the driver: blocks, codes, ids", _mib(self.driver_bytes)),
            ("memory of the driver for a collaborative signal", _mib(self.signal_bytes)),
            ("files of features while it runs", _mib(self.file_bytes)),
            ("read by all workers, all passes", _mib(self.read_bytes)),
            ("arithmetic", f"{self.tera_operations:,.1f} TFLOP"),
        ]


def plan_of(items: int, width: int, settings: SemanticIdConfig) -> Plan:
    """Plan residual k-means, where fewer passes are done if codes settle, or an RQ-VAE.

    Args:
        items: N.
        width: D, with the signal.
        settings: quantizer, levels, codes, iterations, workers, the collaborative signal.
    """
    if settings.quantizer == "rq_vae":
        return _plan_of_rq_vae(items, width, settings)
    workers, codes, levels = max(settings.workers, 1), settings.codes, settings.levels
    passes = levels * (settings.iterations + 2)  # one draws the sample that codewords start from, one assigns in the end
    shard_rows = min(items, ROWS)
    own = -(-items // workers)
    kept = own * width * _FLOAT <= KEPT_BYTES
    rows = own if kept else 2 * shard_rows
    worker = _FLOAT * (rows * width + own * (levels + 2) + BLOCK * codes + 3 * codes * width)
    fitting = codes * width * (levels + 2 * workers) + sample_size(items, codes) * width
    moves = _A_MOVE * min(items, MOST_ROWS)
    driver = _led(items, width, settings) + _FLOAT * fitting + moves
    read = 0 if kept else passes * items * width * _FLOAT
    signal, files = _signal_and_files(items, width, settings)
    return Plan(passes, shard_rows, worker, driver, signal, files, read, 2e-12 * passes * items * codes * width)


def _plan_of_rq_vae(items: int, width: int, settings: SemanticIdConfig) -> Plan:
    from components.semantic_ids.rq_vae import first_sample_size  # brings torch
    from components.semantic_ids.rq_vae_training import OPEN

    own, workers, codes = settings.rq_vae, max(settings.workers, 1), settings.codes
    widths = [width, *own.hidden_dims, own.latent_dim]
    weights = 2 * sum(inside * outside for inside, outside in pairwise(widths))
    codewords = settings.levels * codes * own.latent_dim
    passes = 2 * own.epochs + 3
    shard_rows, batch = min(items, ROWS), min(items, own.batch)
    mine, part = -(-items // workers), -(-batch // workers)
    kept = mine * width * _FLOAT <= KEPT_BYTES
    # Of open shards, a worker whose first or last one is not the first or last of a stretch may have one more than its share.
    held = min(mine, min(-(-OPEN // workers) + (OPEN % workers > 0), OPEN) * shard_rows)
    rows = mine if kept else held + shard_rows  # and one more while it is read
    activations = max(2 * shard_rows * max(widths), 4 * part * sum(widths))
    distances = codes * (2 + 4 * own.sinkhorn)  # of a row
    worker = _FLOAT * (rows * width + activations + part * distances + 3 * (weights + codewords))
    fitting = (4 + workers) * (weights + codewords) + 3 * min(items, first_sample_size(codes)) * own.latent_dim
    driver = _led(items, width, settings) + _FLOAT * (fitting + batch * distances * own.sinkhorn)
    signal, files = _signal_and_files(items, width, settings)
    files += items * own.latent_dim * _FLOAT
    read = 0 if kept else passes * items * width * _FLOAT
    operations = own.epochs * (6 * weights + 2 * codewords) + weights + 2 * codewords
    return Plan(passes, held, worker, driver, signal, files, read, 1e-12 * items * operations)


def _led(items: int, width: int, settings: SemanticIdConfig) -> int:
    """Bytes of who leads, whatever is fitted: blocks of features, ids and codes."""
    blocks = _FLOAT * _BLOCKS * min(items, ROWS) * width
    return _READING + blocks + items * (_AN_ITEM + _A_CODE * settings.levels)


def _signal_and_files(items: int, width: int, settings: SemanticIdConfig) -> tuple[int, int]:
    with_signal = settings.collaborative_weight > 0
    signal = _SVDS[settings.collaborative] * items * settings.collaborative_dim * _FLOAT if with_signal else 0
    return signal, items * width * _FLOAT * (1 + with_signal + (settings.workers > 0))


def _mib(count: int) -> str:
    return f"{count / _MIB:,.0f} MiB"
