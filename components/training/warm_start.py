"""Training that starts from a released model's weights, for new data on the SIDs that its items keep."""

from __future__ import annotations

import pyarrow as pa

from components.retriever.bundle import load_bundle
from components.retriever.model import Retriever
from components.semantic_ids.life_cycle import earlier_codes
from components.semantic_ids.table import codes_of
from infra import records as r
from infra.config import Config
from infra.errors import DataError


def start_from_bundle(model: Retriever, sids: pa.Table, config: Config) -> None:
    """Load the weights of the bundle `training.start_from` into a model for another SID table.

    Raises:
        DataError: an item that both tables have has another SID, or the architectures differ.
        IntegrityError: the bundle is damaged.
    """
    uri = config.training.start_from
    bundle = load_bundle(uri)
    ids = sids.sort_by(r.ITEM_INDEX)[r.ITEM_ID]
    before_NM = earlier_codes(bundle.sids, ids, levels=config.semantic_ids.levels, codes=config.semantic_ids.codes)
    both = (before_NM >= 0).all(axis=1)
    if (before_NM[both] != codes_of(sids)[both]).any():
        raise DataError("items have other SIDs than in the bundle to start from", where=uri, mend="set semantic_ids.earlier and freeze")
    try:
        model.load_state_dict({**bundle.weights, "sid_codes": model.sid_codes})
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise DataError(f"the bundle to start from has another architecture: {first}", where=uri, mend="keep its retriever.*") from error
