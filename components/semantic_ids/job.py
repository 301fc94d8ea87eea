"""Catalogue and training timelines to codebooks and a SID table (`python -m components.semantic_ids.job`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load

from components.semantic_ids.blocks import Catalogue, NewMatrix, cut, filled, open_catalogue, scratch
from components.semantic_ids.coder import QUANTIZER, Coder, new_quantizer, warn_of_blank
from components.semantic_ids.collaborative import Timelines, held_out_pairs, split_users
from components.semantic_ids.collisions import check_capacity, resolve_collisions
from components.semantic_ids.features import ItemFeatures, item_features
from components.semantic_ids.frozen import encode_frozen, frozen_features, join_frozen
from components.semantic_ids.life_cycle import churn, earlier_codes
from components.semantic_ids.quantize import Quantizer
from components.semantic_ids.ray_shards import ray_shards, write_blocks
from components.semantic_ids.report import SECTION, render_page, render_section
from components.semantic_ids.shards import Codes, Ints, LocalShards, Matrix, Shards
from components.semantic_ids.stats import prefix_hit_rate, sid_statistics
from components.semantic_ids.table import codes_of, sids_table
from infra import records as r
from infra import storage
from infra.cluster import ray_session
from infra.config import Config
from infra.errors import DataError
from infra.logs import ProgressMeter, get_logger
from infra.sections import SemanticIdConfig
from infra.steps import Run, StepResult, content_of, job_main, run_step, step_folder

STEP = "semantic_ids"
CODE = ("components/semantic_ids", "infra/records.py", "infra/svg.py")
SIDS, STATS, PAGE = "sids.parquet", "stats.json", "report.html"
_BLOCKS, _NAMED = "blocks", 5


def build_semantic_ids(config: Config, sessions_uri: str, out_uri: str) -> dict[str, Any]:
    """Write the SID table, what gave the items their SIDs, statistics and a report below `out_uri`.

    The catalogue is read a block of items at a time, and features lie in files below `out_uri` until this ends: what grows with the
    catalogue in memory are ids, popularity and codes (`plan.py`), and what timelines take.

    Returns:
        the headline figures of the statistics.

    Raises:
        DataError: too small a code space, unusable features, an earlier table of another shape.
    """
    settings = config.semantic_ids
    with open_catalogue(storage.join(sessions_uri, "catalogue.parquet")) as catalogue:
        check_capacity(len(catalogue), levels=settings.levels, codes=settings.codes, per_sid=items_per_sid(settings))
        before = _earlier(settings, catalogue)
        timelines = training_items(storage.read_table(storage.join(sessions_uri, "timelines")))
        with scratch(out_uri) as new, ray_session(config.cluster) if settings.workers else nullcontext():
            popularity, capacity = catalogue.table(r.POPULARITY)[r.POPULARITY].to_numpy(), items_per_sid(settings)
            if settings.freeze:
                coder = Coder.read(settings.earlier, settings)
                features = frozen_features(catalogue, coder.encoder, new)
            else:
                features = item_features(catalogue, timelines, settings, new=new, seed=config.seed)
                coder = Coder(features.encoder, new_quantizer(settings, seed=config.seed))
            _tell(features, catalogue)
            encoded = None if settings.freeze else _fit(coder, features.features_ND, config, before, out_uri)
            vectors = _quantized(coder.quantizer, features.features_ND, settings, new)
            if encoded is None:
                encoded = encode_frozen(vectors, coder.quantizer)
                codes = join_frozen(encoded, vectors, coder.quantizer, before, _taken(settings), popularity, capacity=capacity)
            else:
                codes = resolve_collisions(encoded, vectors, coder.quantizer.codebooks, popularity, capacity=capacity, before_NM=before)
            stats = _statistics(features, timelines, encoded, codes, coder.quantizer, config)
            stats |= {} if before is None else {"churn": churn(before, codes)}
            _write_report(catalogue, features, codes, popularity, stats, settings, out_uri)
        del encoded, vectors, popularity
        items = catalogue.table(r.ITEM_INDEX, r.ITEM_ID, r.POPULARITY)
        storage.write_table(sids_table(items, codes), storage.join(out_uri, SIDS))
    coder.write(out_uri)
    storage.write_json(storage.join(out_uri, STATS), stats)
    return _headline(stats)


def _tell(features: ItemFeatures, catalogue: Catalogue) -> None:
    items, width = features.features_ND.shape
    get_logger(STEP).info("features", items=items, width=width)
    if len(features.without_features):
        warn_of_blank(len(features.without_features), catalogue.at(r.ITEM_ID, features.without_features[:_NAMED]))


def _fit(coder: Coder, features_ND: Matrix, config: Config, before_NM: Codes | None, out_uri: str) -> Codes:
    settings = config.semantic_ids
    passes = settings.rq_vae.epochs if settings.quantizer == "rq_vae" else settings.levels * settings.iterations
    meter = ProgressMeter(passes, step=STEP, unit="passes")
    with _shards(features_ND, settings, out_uri) as shards:
        codes = coder.quantizer.fit(shards, before_NM=before_NM, tell=lambda level, _: meter.advance(1, level=level + 1))
    meter.close()
    return codes


@contextmanager
def _shards(features_ND: Matrix, settings: SemanticIdConfig, out_uri: str) -> Iterator[Shards]:
    """The features in this process or, with `semantic_ids.workers`, on Ray actors that read them from files."""
    if not settings.workers:
        yield LocalShards(features_ND, threads=os.cpu_count() or 1)
        return
    folder = storage.join(out_uri, _BLOCKS)
    uris = write_blocks((features_ND[block] for block in cut(len(features_ND))), folder)
    try:
        with ray_shards(uris, workers=settings.workers) as shards:
            yield shards
    finally:
        storage.remove(folder)


def _quantized(quantizer: Quantizer, features_ND: Matrix, settings: SemanticIdConfig, new: NewMatrix) -> Matrix:
    """vectors_NL that are quantized: the features, or what an autoencoder makes of them."""
    if settings.quantizer != "rq_vae":
        return features_ND
    return filled(new, len(features_ND), (quantizer.project(features_ND[block]) for block in cut(len(features_ND))))


def _statistics(
    features: ItemFeatures, timelines: Timelines, encoded_NM: Codes, final_NM: Codes, quantizer: Quantizer, config: Config
) -> dict[str, Any]:
    settings = config.semantic_ids
    stats = sid_statistics(features.features_ND, encoded_NM, final_NM, quantizer)
    stats |= {"quantizer": settings.quantizer, "without_features": len(features.without_features), "signal": features.acceptance}
    _, held_out = split_users(timelines, seed=config.seed)
    pairs = held_out_pairs(held_out, window=settings.cooccurrence_window, seed=config.seed)
    return stats | {"prefix_hit_rate": prefix_hit_rate(final_NM, pairs)}


def _earlier(settings: SemanticIdConfig, catalogue: Catalogue) -> Codes | None:
    if not settings.earlier:
        return None
    table = storage.read_table(storage.join(settings.earlier, SIDS))
    return earlier_codes(table, catalogue.table(r.ITEM_ID)[r.ITEM_ID], levels=settings.levels, codes=settings.codes)


def _taken(settings: SemanticIdConfig) -> Codes:
    """Codes of an earlier table, with those of items that are gone: nothing new takes their place."""
    return codes_of(storage.read_table(storage.join(settings.earlier, SIDS)))


def _write_report(
    catalogue: Catalogue,
    features: ItemFeatures,
    codes_NM: Codes,
    popularity_N: Ints,
    stats: dict[str, Any],
    settings: SemanticIdConfig,
    out_uri: str,
) -> None:
    section = render_section(
        stats,
        features_ND=features.features_ND,
        final_NM=codes_NM,
        titles=partial(catalogue.at, r.TITLE),
        popularity_N=popularity_N,
        categories=catalogue.groups(r.CATEGORY),
        acceptance=features.acceptance,
        limits={"max_collision_rate": settings.max_collision_rate, "min_utilisation": settings.min_utilisation},
    )
    storage.write_bytes(storage.join(out_uri, SECTION), section.encode())
    storage.write_bytes(storage.join(out_uri, PAGE), render_page(section, "Semantic IDs").encode())


def _headline(stats: dict[str, Any]) -> dict[str, Any]:
    names = ("items", "quantizer", "collision_rate_before", "collision_rate", "largest_bucket", "moved", "reconstruction_error")
    names_of_levels = ("utilisation", "utilisation_before", "perplexity", "gini", "entropy", "conditional_entropy")
    levels = {name: [level[name] for level in stats["levels"]] for name in names_of_levels}
    more = {"churn": stats["churn"]["changed"]} if "churn" in stats else {}
    return {name: stats[name] for name in names} | levels | more | {"signal": stats["signal"]}


def check_limits(result: StepResult, settings: SemanticIdConfig) -> None:
    """Stop a run whose SIDs are worse than allowed, before anything is trained on them.

    Moving items hides collisions and codewords that nobody took, so it is the codes before that which are judged, and for the use
    of codewords those after it too.

    Args:
        result: of the step; its report is named in the error.
        settings: the limits.

    Raises:
        DataError: with the figures and the limits; one that is not a number fails too.
    """
    figures = result.metadata
    worst, rate = min([*figures["utilisation"], *figures["utilisation_before"]]), figures["collision_rate_before"]
    failed = []
    if not rate <= settings.max_collision_rate:
        failed.append(f"collision rate {rate:.4f} is above max_collision_rate {settings.max_collision_rate}")
    if not worst >= settings.min_utilisation:
        failed.append(f"utilisation {worst:.4f} is below min_utilisation {settings.min_utilisation}")
    if failed:
        raise DataError(
            f"the semantic IDs are refused: {'; '.join(failed)}",
            where=storage.join(result.uri, PAGE),
            mend="try semantic_ids.quantizer=balanced_rq_kmeans, other codes or levels, collisions=unique, or change the limits",
        )


def result_of(uri: str) -> StepResult:
    """A finished step by its folder."""
    metadata = storage.open_committed(uri, verify=False).metadata
    return StepResult(STEP, uri, True, float(metadata["seconds"]), dict(metadata))


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
    """codebooks_MKL of a SID folder."""
    return np.asarray(load(storage.read_bytes(storage.join(uri, QUANTIZER)))["codebooks"])


def step(run: Run, sessions: str, *, hold_to_limits: bool = True) -> StepResult:
    """The step `semantic_ids`: catalogue and training timelines to the SID table, which is held against its limits."""
    identity = _identity(run.config, content_of(sessions))
    result = run_step(run, STEP, lambda out_uri: build_semantic_ids(run.config, sessions, out_uri), **identity)
    if hold_to_limits:
        check_limits(result, run.config.semantic_ids)
    return result


def finished(config: Config, sessions: str) -> storage.Manifest | None:
    """What the step made before with these settings of timelines with this content; None if it has not.

    Raises:
        IntegrityError: the SIDs to start from are gone or damaged.
    """
    return storage.read_manifest(step_folder(config.workspace, STEP, **_identity(config, sessions)))


def _identity(config: Config, sessions: str) -> dict[str, Any]:
    """What decides whether the step is the same work."""
    own = config.semantic_ids
    inputs = {"sessions": sessions} | ({"earlier": content_of(own.earlier)} if own.earlier else {})
    return {"settings": {"semantic_ids": own.model_dump(exclude={"workers"}), "seed": config.seed}, "inputs": inputs, "code": CODE}


if __name__ == "__main__":
    job_main(step, ("sessions",))
