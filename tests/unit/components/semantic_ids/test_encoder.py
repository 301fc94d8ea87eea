"""Texts and given embeddings as vectors, whatever blocks they come in."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.semantic_ids.encoder import FeatureEncoder, TextEncoder, given_embeddings, width_of
from infra import records as r
from infra.errors import DataError
from infra.sections import SemanticIdConfig
from tests.unit.components.semantic_ids.catalogues import items

TEXTS = ["star wars", "star trek", "love story", "", "wars of love", "trek"]
EMBEDDINGS: list[list[float] | None] = [[3, 4], None, [0, 1], [5, 0], None, [1, 1]]
ALL = items(TEXTS, EMBEDDINGS)
CONFIG = SemanticIdConfig(text_dim=3)


def embedded(embeddings: pa.Array, ids: list[str] | None = None) -> pa.RecordBatch:
    return pa.record_batch({r.ITEM_ID: ids or [f"item-{number}" for number in range(len(embeddings))], r.EMBEDDING: embeddings})


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 2), pa.list_(pa.int32())])
def test_embeddings_are_read_from_every_kind_of_list(kind: pa.DataType) -> None:
    batch = embedded(pa.array(EMBEDDINGS, kind))
    expected = np.array([[0, 0] if row is None else row for row in EMBEDDINGS], np.float32)
    np.testing.assert_array_equal(given_embeddings(batch, 2), expected)
    np.testing.assert_array_equal(given_embeddings(batch.slice(1, 3), 2), expected[1:4])
    np.testing.assert_array_equal(given_embeddings(pa.Table.from_batches([batch, batch]), 2), np.concatenate([expected] * 2))
    assert width_of([batch]) == 2


def test_no_embedding_is_a_row_of_zeros() -> None:
    nothing = embedded(pa.array([None, None], pa.list_(pa.float32())))
    assert given_embeddings(nothing, 2).tolist() == [[0, 0], [0, 0]]
    assert width_of([nothing]) == 0


def test_items_of_all_blocks_with_bad_values_are_counted_and_the_first_five_named() -> None:
    bad = [[1.0, float("nan")], [float("inf"), 0.0], [None, 1.0]]
    blocks = [embedded(pa.array([[1.0, 2.0], None, *bad], pa.list_(pa.float32())), [f"{block}{n}" for n in range(5)]) for block in "abc"]
    with pytest.raises(DataError, match=r"9 item embeddings hold NaN or infinity: a2, a3, a4, b2, b3\n"):
        width_of(blocks)
    with pytest.raises(DataError, match=r"3 item embeddings hold NaN or infinity: b2, b3, b4\n"):
        given_embeddings(blocks[1], 2)


def test_widths_of_all_blocks_are_told() -> None:
    blocks = [embedded(pa.array([[0.0] * width], pa.list_(pa.float32()))) for width in (3, 2, 3)]
    with pytest.raises(DataError, match=r"different widths: \[2, 3\]"):
        width_of(blocks)


def test_content_does_not_depend_on_the_blocks() -> None:
    encoder = FeatureEncoder(CONFIG, TextEncoder.fit(iter(TEXTS), CONFIG, seed=0), 2, signal=None)
    whole = encoder.content(ALL)
    assert whole.shape == (6, 5)
    np.testing.assert_array_equal(np.concatenate([encoder.content(ALL.slice(start, 2)) for start in (0, 2, 4)]), whole)


def test_without_parts_content_has_no_width() -> None:
    assert FeatureEncoder(CONFIG, None, 0, signal=None).content(ALL).shape == (6, 0)


def test_a_model_by_name_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    class Model:
        def __init__(self, name: str) -> None:
            loaded.append(name)

        def encode(self, texts: list[str], **_: Any) -> np.ndarray:
            return np.array([[len(text), 1] for text in texts], np.float64)

    package = ModuleType("sentence_transformers")
    package.SentenceTransformer = Model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    encoder = TextEncoder.fit(TEXTS, SemanticIdConfig(text_encoder="some/model"), seed=0)
    for text in TEXTS:
        np.testing.assert_array_equal(encoder.encode([text]), np.array([[len(text), 1]], np.float32))
    assert loaded == ["some/model"]
