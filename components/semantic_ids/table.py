"""The SID table: which item has which codewords."""

from __future__ import annotations

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


def sid_hash(sids: pa.Table) -> str:
    """Hash of which item has which SID; independent of popularity."""
    return storage.hash_json({"ids": sids[r.ITEM_ID].to_pylist(), "codes": sids[r.CODES].to_pylist()})


def sids_table(catalogue: pa.Table, codes_NM: npt.NDArray[np.integer]) -> pa.Table:
    """The SIDS table of a catalogue's items."""
    ends = np.arange(len(codes_NM) + 1, dtype=np.int32) * codes_NM.shape[1]
    codes = pa.ListArray.from_arrays(ends, np.ascontiguousarray(codes_NM, np.int32).ravel())
    columns = [catalogue[r.ITEM_INDEX], catalogue[r.ITEM_ID], codes, catalogue[r.POPULARITY]]
    return pa.table(columns, schema=r.SIDS)
