"""Every table that passes between two steps: column names and Arrow schemas, in this one place.

Ids are opaque strings at the edges (events, items, slates) and dense integers inside: `item_index` is the row of an
item in the catalogue table, which is sorted by `item_id`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import pyarrow as pa

USER_ID: Final = "user_id"
ITEM_ID: Final = "item_id"
REQUEST_ID: Final = "request_id"
TIMESTAMP: Final = "timestamp"
LEVEL: Final = "level"
TITLE: Final = "title"
TEXT: Final = "text"
CATEGORY: Final = "category"
BRAND: Final = "brand"
EMBEDDING: Final = "embedding"
ITEM_INDEX: Final = "item_index"
CODES: Final = "codes"
POPULARITY: Final = "popularity"
SEGMENT: Final = "segment"
SEGMENTS: Final = "segments"
SIGNALS: Final = "signals"
REASON: Final = "reason"
RAW: Final = "raw"


class Level(IntEnum):
    """Feedback levels G1..G4 (RankGR 3.2.2): what a user did with an item in a request."""

    PSEUDO_EXPOSURE = 1
    EXPOSURE = 2
    CLICK = 3
    PURCHASE = 4


class Phase(IntEnum):
    """Which part of the evaluation protocol an event belongs to.

    A model is fitted on TRAIN, tuned on VALID (history = TRAIN) and judged on TEST (history = TRAIN + VALID).
    """

    TRAIN = 0
    VALID = 1
    TEST = 2


EVENTS: Final = pa.schema(
    [
        pa.field(USER_ID, pa.string(), nullable=False),
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field(REQUEST_ID, pa.string()),  # null: requests are cut by time gaps
        pa.field(TIMESTAMP, pa.int64(), nullable=False),  # milliseconds, UTC
        pa.field(LEVEL, pa.int8(), nullable=False),  # Level
        pa.field(SEGMENT, pa.string()),  # of the user; null where the log names none
        pa.field(SIGNALS, pa.list_(pa.float32())),  # in the order of `data.columns.signals`; null where it names none
    ]
)

QUARANTINE: Final = pa.schema(
    [
        pa.field("source", pa.string()),  # events | items
        pa.field(REASON, pa.string()),
        pa.field(RAW, pa.string()),  # the row as JSON
    ]
)

CATALOGUE: Final = pa.schema(
    [
        pa.field(ITEM_INDEX, pa.int32(), nullable=False),
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field(TITLE, pa.string(), nullable=False),
        pa.field(TEXT, pa.string(), nullable=False),  # empty: an item seen in the logs only
        pa.field(CATEGORY, pa.string(), nullable=False),
        pa.field(BRAND, pa.string(), nullable=False),
        pa.field(EMBEDDING, pa.list_(pa.float32())),  # null where the catalogue brings none
        pa.field(POPULARITY, pa.int64(), nullable=False),  # positive events in the training phase
        # Positive events of users of each segment, for those segments where the item is among the most popular; null: none.
        pa.field(SEGMENTS, pa.list_(pa.struct([pa.field(SEGMENT, pa.string()), pa.field(POPULARITY, pa.int64())]))),
    ]
)

TIMELINES: Final = pa.schema(
    [
        pa.field(USER_ID, pa.string(), nullable=False),
        pa.field("items", pa.list_(pa.int32()), nullable=False),  # item_index, in time order
        pa.field("levels", pa.list_(pa.int8()), nullable=False),  # Level
        pa.field("timestamps", pa.list_(pa.int64()), nullable=False),
        pa.field("requests", pa.list_(pa.int32()), nullable=False),  # 0, 0, 1, ...: ordinal of the request of the user
        pa.field("phases", pa.list_(pa.int8()), nullable=False),  # Phase, never decreasing
        # The values of each event, one after the other, in the order of `data.columns.signals`; null: not known, or none are named.
        pa.field(SIGNALS, pa.list_(pa.float32())),
    ]
)

SIDS: Final = pa.schema(
    [
        pa.field(ITEM_INDEX, pa.int32(), nullable=False),
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field(CODES, pa.list_(pa.int32()), nullable=False),  # one codeword a level
        pa.field(POPULARITY, pa.int64(), nullable=False),
    ]
)
