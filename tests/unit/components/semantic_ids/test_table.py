"""SIDs as a table, as numbers, and how often each occurs."""

from __future__ import annotations

import numpy as np

from components.semantic_ids.table import codes_of, run_lengths, sid_numbers, sids_table
from infra import records as r
from tests.unit.components.semantic_ids.catalogues import items

CODES = np.array([[2, 0, 1], [0, 0, 0], [2, 0, 1], [1, 2, 2]], np.int32)


def test_a_table_has_the_codes_of_each_item() -> None:
    table = sids_table(items(["a", "b", "c", "d"]), CODES)
    assert table.schema == r.SIDS
    assert table[r.CODES].to_pylist() == CODES.tolist()
    np.testing.assert_array_equal(codes_of(table.take([3, 1, 0, 2])), CODES)  # by item index, whatever the order of rows
    np.testing.assert_array_equal(codes_of(sids_table(items(["a"]), CODES[:1, ::-1])), CODES[:1, ::-1])


def test_numbers_are_in_the_order_of_the_sids() -> None:
    assert sid_numbers(CODES, 3).tolist() == [2 * 9 + 1, 0, 2 * 9 + 1, 9 + 2 * 3 + 2]
    assert sid_numbers(np.full((1, 4), 8191), 8192).tolist() == [8192**4 - 1]


def test_run_lengths_by_hand() -> None:
    assert run_lengths(np.array([1, 1, 4, 5, 5, 5])).tolist() == [2, 1, 3]
    assert run_lengths(np.array([7])).tolist() == [1]
