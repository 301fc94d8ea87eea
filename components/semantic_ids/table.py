"""The SID table: which item has which codewords."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra import records as r
from infra import storage


def codes_of(sids: pa.Table) -> npt.NDArray[np.int32]:
    """codes_NM of a SIDS table, in the order of item indices."""
    order = np.argsort(sids[r.ITEM_INDEX].to_numpy(), kind="stable")
    codes = sids[r.CODES].combine_chunks()
    return np.asarray(codes.flatten().to_numpy().reshape(len(codes), -1)[order], dtype=np.int32)


def sid_numbers(codes_NM: npt.NDArray[np.integer], n_codes: int) -> npt.NDArray[np.int64]:
    """SIDs as numbers of base `n_codes`, in the order of the SIDs; `codes` and `levels` of the settings leave room for them."""
    numbers_N = np.zeros(len(codes_NM), np.int64)
    for codes_N in codes_NM.T:
        numbers_N *= n_codes
        numbers_N += codes_N
    return numbers_N


def run_lengths(sorted_N: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """How often each value occurs in something sorted, in that order."""
    changes = np.ones(len(sorted_N) + 1, np.bool_)
    np.not_equal(sorted_N[1:], sorted_N[:-1], out=changes[1:-1])
    return np.diff(np.flatnonzero(changes))


def sid_hash(sids: pa.Table) -> str:
    """Hash of which item has which SID; independent of popularity."""
    return storage.hash_json({"ids": sids[r.ITEM_ID].to_pylist(), "codes": sids[r.CODES].to_pylist()})


def sids_table(catalogue: pa.Table, codes_NM: npt.NDArray[np.integer]) -> pa.Table:
    """The SIDS table of a catalogue's items."""
    ends = np.arange(len(codes_NM) + 1, dtype=np.int32) * codes_NM.shape[1]
    codes = pa.ListArray.from_arrays(ends, np.ascontiguousarray(codes_NM, np.int32).ravel())
    columns = [catalogue[r.ITEM_INDEX], catalogue[r.ITEM_ID], codes, catalogue[r.POPULARITY]]
    return pa.table(columns, schema=r.SIDS)
