"""New items for the champion without training: they get SIDs on its frozen codebooks, and its trie leads to them at once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import save

from components.release.job import BUNDLE, CODE, STEP, grown_of, promoted
from components.retriever.bundle import Bundle, load_bundle, write_bundle
from components.semantic_ids.coder import Coder
from components.semantic_ids.job import items_per_sid
from components.semantic_ids.life_cycle import add_items
from components.semantic_ids.table import codes_of
from infra import records as r
from infra import storage
from infra.errors import ServiceError
from infra.logs import get_logger
from infra.steps import Run, StepResult, content_of, run_step
from infra.tracking import Registered, Registry


def grow_champion(run: Run, items: pa.Table) -> StepResult | None:
    """Release the champion once more, with more items.

    Weights, settings and the SIDs that are there stay; the catalogue and the SID table grow at their ends. The report of the
    champion is carried along: it was judged without the new items, which the manifest counts.

    Args:
        run: any of the workspace; the step `release` of the one that the champion came from becomes the grown one.
        items: CATALOGUE rows; items that the champion knows already are left out.

    Returns:
        the step, with `version`, `mlflow_version` and `added` (item id -> SID); None where nothing is new.

    Raises:
        DataError: there is no champion, or it has no bundle; an item id occurs twice, unusable embeddings, no room for so many.
        ServiceError: another model became champion meanwhile.
    """
    registry = Registry(run.config.tracking, run.config.workspace)
    champion = registry.require_champion()
    run = replace(run, run_id=champion.origin.get("run_id", run.run_id))
    bundle = load_bundle(champion.bundle_uri)
    settings = bundle.config.semantic_ids
    sids = add_items(bundle.sids, Coder.read(champion.bundle_uri, settings), items, capacity=items_per_sid(settings))
    added = dict(zip(*(sids.slice(len(bundle.sids))[name].to_pylist() for name in (r.ITEM_ID, r.CODES)), strict=True))
    if not added:
        return None
    catalogue = _grown_catalogue(bundle.catalogue, items, set(added))

    def work(out_uri: str) -> dict[str, Any]:
        return _register(storage.join(out_uri, BUNDLE), registry, champion, bundle, sids, catalogue, added)

    settings_of_step = {"tracking": run.config.tracking.model_dump()}
    inputs = {"champion": content_of(champion.bundle_uri), "added": storage.hash_json(added)}
    grow = partial(run_step, name=STEP, work=work, settings=settings_of_step, inputs=inputs, code=CODE)
    result = grow(run)
    now = registry.champion()
    if now is None or now.bundle_uri not in (champion.bundle_uri, storage.join(result.uri, BUNDLE)):
        raise ServiceError("another model became champion meanwhile", where=registry.address, mend="run the same command again")
    return promoted(registry, result, lambda: grow(replace(run, fresh=True)))


def _register(
    uri: str, registry: Registry, champion: Registered, bundle: Bundle, sids: pa.Table, catalogue: pa.Table, added: dict[str, Any]
) -> dict[str, Any]:
    codes = torch.from_numpy(codes_of(sids)).to(bundle.weights["sid_codes"].dtype)
    lineage = {"grown_from": champion.bundle_uri, "grown_of": grown_of(champion.bundle_uri) or bundle.version}
    manifest = write_bundle(
        uri,
        config=bundle.config,
        weights=save({**bundle.weights, "sid_codes": codes}),
        sids=sids,
        catalogue=catalogue,
        coder=champion.bundle_uri,
        metadata={"report": champion.report, "items_added": len(added), **lineage},
    )
    number = registry.register(
        uri,
        evaluation=champion.evaluation,
        metrics={"items": float(len(sids)), "items_added": float(len(added))},
        params=lineage,
        files={"config.json": bundle.config.to_json()},
        origin=champion.origin,
    )
    version = manifest.digest[:12]
    get_logger(STEP).info("registered", version=version, mlflow_version=number, items_added=len(added))
    return {"version": version, "mlflow_version": number, "added": added}


def _grown_catalogue(catalogue: pa.Table, items: pa.Table, added: set[str]) -> pa.Table:
    """New rows at the end, in the order of the SID table's."""
    new = items.filter(pa.array([item_id in added for item_id in items[r.ITEM_ID].to_pylist()]))
    indices = pa.array(range(len(catalogue), len(catalogue) + len(new)), pa.int32())
    numbered = new.set_column(new.schema.get_field_index(r.ITEM_INDEX), r.ITEM_INDEX, indices)
    return pa.concat_tables([catalogue, numbered.select(catalogue.schema.names).cast(catalogue.schema)]).combine_chunks()
