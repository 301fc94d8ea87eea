"""A catalogue is read by blocks, matrices lie in files that do not outlive their context."""

from __future__ import annotations

import errno
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from components.semantic_ids import blocks
from components.semantic_ids.blocks import Catalogue, cut, filled, open_catalogue, scratch
from infra import records as r
from infra.errors import DataError, IntegrityError, StorageError
from tests.unit.components.semantic_ids.catalogues import items, written

TEXTS = [f"text {number}" for number in range(10)]


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalogue:
    """Ten items in blocks of three."""
    monkeypatch.setattr(blocks, "ROWS", 3)
    return written(items(TEXTS), tmp_path)


def test_blocks_have_the_columns_asked_for_and_all_rows_once(catalogue: Catalogue) -> None:
    found = list(catalogue.blocks(r.TEXT))
    assert [len(block) for block in found] == [3, 3, 3, 1]
    assert [block.schema.names for block in found] == [[r.TEXT]] * 4
    assert [text for block in found for text in block[r.TEXT].to_pylist()] == TEXTS
    assert len(catalogue) == 10


def test_whole_columns_are_a_table(catalogue: Catalogue) -> None:
    assert catalogue.table(r.ITEM_ID, r.ITEM_INDEX)[r.ITEM_INDEX].to_pylist() == list(range(10))


def test_values_of_a_few_rows_come_in_their_order(catalogue: Catalogue) -> None:
    assert catalogue.at(r.ITEM_ID, np.array([9, 0, 3, 9])) == ["item-9", "item-0", "item-3", "item-9"]
    assert catalogue.at(r.ITEM_ID, np.empty(0, np.int64)) == []


def test_groups_number_the_values_of_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ROWS", 2)
    groups = written(items(["b", "a", "b", "c", "a"]), tmp_path).groups(r.TEXT)
    names = groups.dictionary.to_pylist()
    assert sorted(names) == ["a", "b", "c"]
    assert [names[number] for number in groups.indices.to_pylist()] == ["b", "a", "b", "c", "a"]


def test_a_catalogue_without_items_is_refused(tmp_path: Path) -> None:
    path = written(items([]), tmp_path).path
    with pytest.raises(DataError, match="has no items"), open_catalogue(str(path)):
        pass


def test_a_damaged_catalogue_is_refused(tmp_path: Path) -> None:
    (tmp_path / "catalogue.parquet").write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match="not a readable Parquet file"), open_catalogue(str(tmp_path / "catalogue.parquet")):
        pass


@pytest.mark.parametrize("error", [None, DataError, KeyboardInterrupt])
def test_files_go_when_the_context_ends_however_it_ends(tmp_path: Path, error: type[BaseException] | None) -> None:
    try:
        with scratch(str(tmp_path / "out")) as new:
            matrix = new(4, 3)
            assert [path.stat().st_size for path in tmp_path.rglob("*.f32")] == [48]
            if error:
                raise error("that")
    except (DataError, KeyboardInterrupt):
        assert error
    assert list((tmp_path / "out").iterdir()) == []
    assert matrix.shape == (4, 3)  # it can be read still


def test_files_of_an_output_elsewhere_lie_among_the_temporary_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch("s3://bucket/out") as new:
        new(1, 1)
        assert len(list(tmp_path.rglob("*.f32"))) == 1
    assert list(tmp_path.iterdir()) == []


def test_matrices_are_zero_float32_apart_from_each_other_and_may_be_empty(tmp_path: Path) -> None:
    with scratch(str(tmp_path)) as new:
        one, two = new(2, 2), new(2, 2)
        one[:] = 7
        assert (one.dtype, two.tolist()) == (np.float32, [[0, 0], [0, 0]])
        assert new(5, 0).shape == (5, 0)


def test_a_matrix_takes_no_memory(tmp_path: Path) -> None:
    with scratch(str(tmp_path)) as new:
        tracemalloc.start()
        new(4096, 256)[:] = 1
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 100_000


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="the disk is full"), scratch(str(tmp_path)) as new:
        new(2, 2)


def test_a_matrix_is_filled_block_by_block(catalogue: Catalogue) -> None:
    rows = np.arange(20, dtype=np.float32).reshape(10, 2)
    parts = [rows[block] for block in cut(10)]
    assert [len(part) for part in parts] == [3, 3, 3, 1]
    np.testing.assert_array_equal(filled(lambda *shape: np.zeros(shape, np.float32), 10, parts), rows)
