"""Catalogue and training timelines to codebooks and a SID table (`python -m components.semantic_ids.job`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load, save

from components.semantic_ids.collisions import check_capacity, resolve_collisions
from components.semantic_ids.features import item_features
from components.semantic_ids.quantize import Matrix, ResidualKMeans
from components.semantic_ids.stats import sid_statistics
from infra import records as r
from infra import storage
from infra.config import Config, SemanticIdConfig
from infra.logs import get_logger
from infra.steps import Run, StepResult, content_of, job_main, run_step

STEP = "semantic_ids"
CODE = ("components/semantic_ids", "infra/records.py")
SIDS, CODEBOOKS, STATS = "sids.parquet", "codebooks.safetensors", "stats.json"


def build_semantic_ids(config: Config, sessions_uri: str, out_uri: str) -> dict[str, Any]:
    """Write the SID table, the codebooks and their statistics below `out_uri`.

    Returns:
        the headline figures of the statistics.

    Raises:
        DataError: too small a code space, unusable features.
    """
    settings = config.semantic_ids
    catalogue = storage.read_table(storage.join(sessions_uri, "catalogue.parquet"))
    capacity = items_per_sid(settings)
    check_capacity(len(catalogue), levels=settings.levels, codes=settings.codes, per_sid=capacity)
    features = item_features(
        catalogue[r.TEXT].to_pylist(),
        catalogue[r.EMBEDDING].to_pylist(),
        training_items(storage.read_table(storage.join(sessions_uri, "timelines"))),
        settings,
        item_ids=catalogue[r.ITEM_ID].to_pylist(),
        seed=config.seed,
    )
    get_logger(STEP).info("features", items=len(features), width=features.shape[1])
    quantizer = ResidualKMeans(settings.levels, settings.codes, settings.iterations, config.seed).fit(features)
    encoded = quantizer.encode(features)
    popularity = catalogue[r.POPULARITY].to_numpy()
    codes = resolve_collisions(encoded, features, quantizer.codebooks_MKD, popularity, capacity=capacity)
    stats = sid_statistics(features, encoded, codes, quantizer.codebooks_MKD)
    table = pa.table(
        [catalogue[r.ITEM_INDEX], catalogue[r.ITEM_ID], pa.array(codes.tolist(), pa.list_(pa.int32())), catalogue[r.POPULARITY]],
        schema=r.SIDS,
    )
    storage.write_table(table, storage.join(out_uri, SIDS))
    storage.write_bytes(storage.join(out_uri, CODEBOOKS), save({"codebooks": quantizer.codebooks_MKD}))
    storage.write_json(storage.join(out_uri, STATS), stats)
    headline = {key: stats[key] for key in ("items", "collision_rate_before", "collision_rate", "largest_bucket", "reconstruction_error")}
    return {**headline, "utilisation": [level["utilisation"] for level in stats["levels"]]}


def items_per_sid(settings: SemanticIdConfig) -> int:
    """Capacity of a SID."""
    return 1 if settings.collisions == "unique" else settings.max_items_per_sid


def training_items(timelines: pa.Table) -> list[np.ndarray]:
    """Item indices of each user's training phase: SIDs must not know what is to be predicted."""
    columns = timelines.select(["items", "phases"]).to_pydict()
    items = (
        np.asarray(i, dtype=np.int64)[np.asarray(p) == r.Phase.TRAIN] for i, p in zip(columns["items"], columns["phases"], strict=True)
    )
    return [i for i in items if len(i) > 1]


def read_codebooks(uri: str) -> Matrix:
    """codebooks_MKD of a SID folder."""
    return np.asarray(load(storage.read_bytes(storage.join(uri, CODEBOOKS)))["codebooks"])


def step(run: Run, sessions: str) -> StepResult:
    """The step `semantic_ids`: catalogue and training timelines to the SID table."""
    settings = {"semantic_ids": run.config.semantic_ids.model_dump(), "seed": run.config.seed}
    return run_step(
        run,
        STEP,
        lambda out_uri: build_semantic_ids(run.config, sessions, out_uri),
        settings=settings,
        inputs={"sessions": content_of(sessions)},
        code=CODE,
    )


if __name__ == "__main__":
    job_main(step, ("sessions",))
