"""Training that starts from a bundle: its weights, on a table where its items kept their SIDs."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from components.retriever.bundle import write_bundle
from components.retriever.model import Retriever
from components.semantic_ids.coder import FILES
from components.training.loop import build_model
from components.training.warm_start import start_from_bundle
from infra import records, storage
from infra.config import Config
from infra.errors import DataError
from tests.unit.components.training.small import N_ITEMS, configuration, sids


@pytest.fixture
def released(tmp_path: Path) -> tuple[Config, Retriever]:
    """Settings that name a bundle to start from, and the model in it."""
    model = build_model(configuration("seed=1"), sids())
    rest = {"text": "", "title": "", "category": "", "brand": "", "embedding": None, "popularity": 1}
    rows = [{"item_index": i, "item_id": f"i{i}", **rest} for i in range(N_ITEMS)]
    for name in FILES:
        storage.write_bytes(str(tmp_path / "coder" / name), b"")
    write_bundle(
        str(tmp_path / "bundle"),
        config=configuration(),
        weights=save(model.state_dict()),
        sids=sids(),
        catalogue=pa.Table.from_pylist(rows, schema=records.CATALOGUE),
        coder=str(tmp_path / "coder"),
        metadata={},
    )
    return configuration(f"training.start_from={tmp_path / 'bundle'}"), model


def grown(first: list[int]) -> pa.Table:
    """The table with an item that comes before the others, and the codes of what was the first."""
    rows = [{"item_index": 0, "item_id": "new", "codes": [3, 3], "popularity": 0}]
    rows += [{**row, "item_index": row["item_index"] + 1} for row in sids().to_pylist()]
    rows[1]["codes"] = first
    return pa.Table.from_pylist(rows, schema=records.SIDS)


def test_it_has_the_weights_of_the_bundle_and_the_sids_of_the_new_table(released: tuple[Config, Retriever]) -> None:
    config, before = released
    table = grown(first=[0, 0])
    model = build_model(config, table)
    assert not torch.equal(next(model.parameters()), next(before.parameters()))
    start_from_bundle(model, table, config)
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert model.sid_codes.tolist() == table["codes"].to_pylist()


def test_a_table_that_gave_an_item_another_sid_is_refused(released: tuple[Config, Retriever]) -> None:
    config, _ = released
    table = grown(first=[3, 2])
    with pytest.raises(DataError, match="items have other SIDs"):
        start_from_bundle(build_model(config, table), table, config)


def test_another_architecture_is_refused(released: tuple[Config, Retriever]) -> None:
    config, _ = released
    wider = configuration(f"training.start_from={config.training.start_from}", "retriever.hidden_size=32")
    with pytest.raises(DataError, match="another architecture"):
        start_from_bundle(build_model(wider, sids()), sids(), wider)
