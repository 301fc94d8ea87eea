"""The refresh pipeline: newer logs for the champion. Its items keep their SIDs, new ones join, training goes on from its weights."""

from typing import Any

from pipelines.placement import DEFAULT, Placement
from pipelines.training import build


def refresh_pipeline(placement: Placement = DEFAULT) -> Any:
    """The walk of the training pipeline with the champion's model, SIDs and weights to start from (`pipelines.parameters.refreshed`).

    Steps whose inputs did not change are skipped, so that a run without new events only looks.
    """
    description = (
        "Newer logs: timelines, SIDs of new items on frozen codebooks, training from the champion's weights, gate, release, slates."
    )
    return build(placement, name="rankgr-refresh", description=description, refresh=True)
