"""Who is judged on what: cases out of timelines, the same ones for every method.

The catalogue is ranked in full, without sampled negatives. A model is fitted on TRAIN, tuned on the VALID cases
(history = TRAIN) and judged on the TEST cases (history = TRAIN + VALID).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.retriever.contract import History, Ints
from infra.records import USER_ID, Phase


@dataclass(frozen=True)
class Cases:
    """Users to be judged, in the order of their ids.

    Attributes:
        user_ids: one a case.
        histories: what a method may look at, never empty.
        truths: name -> for each case the distinct items that count as a hit, in rising order; may be empty for one
            name but not for all of them.
        exclude_seen: whether methods leave out the items of the history; the truths were cut to match.
        cold_start_users: users with a truth but no history, who are not judged.
    """

    user_ids: list[str]
    histories: list[History]
    truths: dict[str, list[Ints]]
    exclude_seen: bool
    cold_start_users: int

    def __len__(self) -> int:
        return len(self.user_ids)


@dataclass(frozen=True)
class TrainEvents:
    """Events of the training phase as flat arrays of one length, user after user and in time order within a user.

    Attributes:
        users: row of the timelines table.
        items: catalogue indices.
        levels: feedback levels.
        timestamps: milliseconds, UTC.
    """

    users: Ints
    items: Ints
    levels: Ints
    timestamps: Ints


def build_cases(
    timelines: pa.Table,
    phase: Phase,
    truths: Mapping[str, int],
    *,
    exclude_seen: bool,
    min_level: int = 1,
    max_users: int | None = None,
    seed: int = 0,
) -> Cases:
    """Cut each timeline into the history before a phase and the truths within it.

    The history is every event of an earlier phase with at least `min_level`. A truth is the set of distinct items with
    an event of the phase at or above the truth's level. Where `exclude_seen` is set, no method can return an item of
    the history, so truths that lie in the history are dropped: they count neither as a hit nor in the denominator.
    Otherwise they stay and may be hit. A user whose history or whose every truth is empty is not judged.

    Args:
        timelines: table in the `infra.records.TIMELINES` schema.
        phase: VALID or TEST.
        truths: name -> lowest level that counts, as in `EvaluationConfig.truths`.
        exclude_seen: whether methods will leave out the items of the history.
        min_level: events below it are no history.
        max_users: judge a sample of this size; it does not depend on the order of the rows.
        seed: of the sample.
    """
    starts, flat = _flatten(timelines)
    user_ids: list[str] = timelines[USER_ID].to_pylist()
    judged: list[tuple[str, History, dict[str, Ints]]] = []
    cold = 0
    for row in sorted(range(len(user_ids)), key=user_ids.__getitem__):
        events = {name: values[starts[row] : starts[row + 1]] for name, values in flat.items()}
        past = (events["phases"] < phase) & (events["levels"] >= min_level)
        history = History(events["items"][past], events["levels"][past])
        found = _truths(events, phase, truths, seen=history.items if exclude_seen else None)
        if not any(len(items) for items in found.values()):
            continue
        if len(history.items) == 0:
            cold += 1
            continue
        judged.append((user_ids[row], history, found))
    if max_users is not None and max_users < len(judged):
        chosen = np.random.default_rng(seed).choice(len(judged), max_users, replace=False)
        judged = [judged[index] for index in np.sort(chosen)]
    return Cases(
        user_ids=[user for user, _, _ in judged],
        histories=[history for _, history, _ in judged],
        truths={name: [found[name] for _, _, found in judged] for name in truths},
        exclude_seen=exclude_seen,
        cold_start_users=cold,
    )


def train_events(timelines: pa.Table) -> TrainEvents:
    """The events with phase TRAIN, all that a baseline may be fitted on."""
    starts, flat = _flatten(timelines)
    kept = flat["phases"] == Phase.TRAIN
    users = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    return TrainEvents(users[kept], flat["items"][kept], flat["levels"][kept], flat["timestamps"][kept])


def _flatten(timelines: pa.Table) -> tuple[Ints, dict[str, Ints]]:
    """Where each row starts, with the end as the last entry, and the list columns laid end to end."""
    lengths: npt.NDArray[np.int64] = pc.list_value_length(timelines["items"]).to_numpy()
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    columns = ("items", "levels", "timestamps", "phases")
    return starts, {name: pc.list_flatten(timelines[name]).to_numpy() for name in columns}


def _truths(events: Mapping[str, Ints], phase: Phase, levels: Mapping[str, int], *, seen: Ints | None) -> dict[str, Ints]:
    now = events["phases"] == phase
    found = {name: np.unique(events["items"][now & (events["levels"] >= level)]) for name, level in levels.items()}
    return found if seen is None else {name: np.setdiff1d(items, seen) for name, items in found.items()}
