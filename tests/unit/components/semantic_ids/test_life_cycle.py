"""SID tables over time: earlier codes by item, churn, items that join."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from components.semantic_ids.coder import Coder
from components.semantic_ids.collisions import resolve_collisions
from components.semantic_ids.life_cycle import add_items, churn, earlier_codes
from components.semantic_ids.quantize import ResidualKMeans, encode
from components.semantic_ids.shards import Codebook, LocalShards
from components.semantic_ids.table import codes_of, sid_hash, sids_table
from infra import records as r
from infra.errors import DataError

# Points on a line: the first level in steps of 100, the second in steps of 10.
CODEBOOKS = tuple(Codebook.free(np.array(codewords, np.float32)) for codewords in ([[0], [100], [400]], [[0], [10], [20]]))


class Places:
    """An encoder that reads an item's place on the line from its text."""

    def transform(self, items: pa.Table) -> np.ndarray:
        return np.array([[float(text)] for text in items["text"].to_pylist()], np.float32).reshape(len(items), 1)


CODER = Coder(Places(), ResidualKMeans.frozen(CODEBOOKS))  # type: ignore[arg-type]


def catalogue(*places: tuple[str, int]) -> pa.Table:
    rows = [
        {**dict.fromkeys(r.CATALOGUE.names, ""), "item_index": i, "item_id": name, "text": str(place), "embedding": None, "popularity": 0}
        for i, (name, place) in enumerate(places)
    ]
    return pa.Table.from_pylist(rows, schema=r.CATALOGUE)


def table(*places: tuple[str, int]) -> pa.Table:
    vectors = np.array([[place] for _, place in places], np.float32)
    return sids_table(catalogue(*places), encode(vectors, CODEBOOKS))


def test_new_items_get_the_nearest_free_sid_and_old_ones_keep_theirs() -> None:
    before = table(("a", 0), ("b", 110))
    after = add_items(before, CODER, catalogue(("b", 0), ("c", 111), ("d", 20)), capacity=1)
    assert after.slice(0, 2).equals(before)
    assert after.schema == r.SIDS
    assert after["item_id"].to_pylist() == ["a", "b", "c", "d"]
    assert after["item_index"].to_pylist() == [0, 1, 2, 3]
    assert codes_of(after).tolist() == [[0, 0], [1, 1], [1, 2], [0, 2]]


def test_nothing_new_changes_nothing() -> None:
    before = table(("a", 0), ("b", 110))
    assert sid_hash(add_items(before, CODER, catalogue(("a", 110)), capacity=1)) == sid_hash(before)


def test_a_new_item_that_occurs_twice_is_named() -> None:
    with pytest.raises(DataError, match="1 item ids occur twice: x"):
        add_items(table(("a", 0)), CODER, catalogue(("x", 0), ("y", 10), ("x", 20)), capacity=1)


def test_no_room_for_the_new_items_is_told() -> None:
    with pytest.raises(DataError, match="there is room for 9 items, 1 are there and 9 are new"):
        add_items(table(("a", 0)), CODER, catalogue(*((str(n), 0) for n in range(9))), capacity=1)


def test_earlier_codes_go_by_item_id() -> None:
    sids = table(("a", 0), ("b", 110))
    assert earlier_codes(sids, pa.array(["b", "new", "a"]), levels=2, codes=3).tolist() == [[1, 1], [-1, -1], [0, 0]]


@pytest.mark.parametrize(("levels", "codes"), [(3, 3), (2, 1)])
def test_an_earlier_table_of_another_shape_is_refused(levels: int, codes: int) -> None:
    with pytest.raises(DataError, match="the earlier SIDs have 2 levels of up to 2 codes") as caught:
        earlier_codes(table(("a", 0), ("b", 110)), pa.array(["a"]), levels=levels, codes=codes)
    assert caught.value.where == "semantic_ids.earlier"


def test_churn_counts_items_that_both_tables_have() -> None:
    before = np.array([[0, 0], [1, 1], [1, 2], [0, 1], [-1, -1]])
    after = np.array([[0, 0], [1, 0], [0, 2], [0, 1], [1, 1]])
    assert churn(before, after) == {"items": 4, "changed": 0.5, "changed_by_level": [0.25, 0.5], "new": 1}


def test_churn_of_tables_without_common_items_is_nothing() -> None:
    assert churn(np.full((2, 2), -1), np.zeros((2, 2), np.int32)) == {"items": 0, "changed": 0.0, "changed_by_level": [0.0, 0.0], "new": 2}


def test_a_new_fit_that_starts_from_earlier_sids_keeps_most_of_them() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(8, 6))[rng.integers(0, 8, 400)] * 5 + rng.normal(size=(400, 6))).astype(np.float32)
    popularity = np.arange(400)

    def sids(rows: np.ndarray, *, seed: int, before: np.ndarray | None = None) -> np.ndarray:
        quantizer = ResidualKMeans(2, 32, 25, seed=seed)
        encoded = quantizer.fit(LocalShards(rows), before_NM=before)
        return resolve_collisions(encoded, rows, quantizer.codebooks, popularity[: len(rows)], capacity=1, before_NM=before)

    earlier = np.concatenate([sids(vectors[:360], seed=0), np.full((40, 2), -1, np.int32)])
    kept = churn(earlier, sids(vectors, seed=1, before=earlier))
    anew = churn(earlier, sids(vectors, seed=1))
    assert kept["new"] == 40
    assert kept["changed"] < 0.25
    assert anew["changed"] > 0.9
