"""Timelines to sessions: the items shown in one request, what each earned, and what the user had done before.

Shapes: E events of all users, S sessions, B sessions of a batch, N items of a session, T events before it, O objectives,
F signals.
A label is 1, 0, or NaN where the log does not say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from components.reward.rates import log_odds_before, log_odds_beside_events, mean_rates
from infra import records as r
from infra.config import Config
from infra.errors import DataError

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
_Number = TypeVar("_Number", np.int64, np.float32)
AGES = 24
"""Buckets of the time between an event and the request: powers of two of a minute; the last holds what is older than that."""
FOLDS = 8
"""Users are dealt to so many folds for the rates of items."""
ITEM_PRIOR, USER_PRIOR = 20.0, 5.0
"""Events with the mean rate that are added to those of an item, and to those of a user before a session."""
_MINUTE_MS = 60_000
_CHUNK = 32  # batches that are sorted together, so that little of them is padding


@dataclass(frozen=True)
class Sessions:
    """Events of all users, user after user and in time order, and the sessions that they form.

    Attributes:
        items_E: catalogue indices.
        levels_E: feedback levels.
        times_E: milliseconds, UTC.
        users_E: row of the timelines table.
        labels_EO: what the user did, one column an objective.
        rates_EO: log odds of the item of each event, its own label not in them (`rates`).
        habits_SO: log odds of the user before each session.
        starts_S: first event of each session.
        ends_S: behind its last event.
        firsts_S: first event of its user: behaviour is what lies from there to the start.
        phases_S: `records.Phase`.
    """

    items_E: Ints
    levels_E: Ints
    times_E: Ints
    users_E: Ints
    labels_EO: Floats
    rates_EO: Floats
    habits_SO: Floats
    starts_S: Ints
    ends_S: Ints
    firsts_S: Ints
    phases_S: Ints

    def of_phase(self, phase: r.Phase) -> Ints:
        """Numbers of the sessions of a phase."""
        return np.flatnonzero(self.phases_S == phase)

    def events_of(self, sessions: Ints) -> Ints:
        """Events of some sessions, one session after the other."""
        lengths = self.ends_S[sessions] - self.starts_S[sessions]
        before = np.cumsum(lengths) - lengths
        return np.repeat(self.starts_S[sessions] - before, lengths) + np.arange(lengths.sum())


@dataclass(frozen=True)
class Batch:
    """Some sessions, padded.

    Attributes:
        items_BN: catalogue indices, 0 where there is none.
        is_item_BN: where there is one.
        labels_BNO: of the items; NaN where there is none.
        rates_BNO: log odds of the items.
        habits_BO: log odds of the user.
        past_items_BT: behaviour before the request, the latest at the end.
        past_levels_BT: feedback levels.
        past_ages_BT: bucket of the time until the request.
        past_labels_BTO: what the user did then.
        past_rates_BTO: log odds of those items.
        is_past_BT: where there is an event.
    """

    items_BN: Ints
    is_item_BN: Bools
    labels_BNO: Floats
    rates_BNO: Floats
    habits_BO: Floats
    past_items_BT: Ints
    past_levels_BT: Ints
    past_ages_BT: Ints
    past_labels_BTO: Floats
    past_rates_BTO: Floats
    is_past_BT: Bools


def objectives_of(config: Config) -> list[str]:
    """What is foreseen: the signals that the log names, or those of them that are asked for."""
    reward = config.reward
    return [name for name in config.data.columns.signals if name in reward.objectives or not reward.objectives]


def sessions_of(timelines: pa.Table, config: Config, objectives: Sequence[str]) -> Sessions:
    """Cut timelines into sessions.

    A request that reaches over the border of two phases is cut there. The label of an event is 1 where its signal is at least
    the objective's threshold, or above 0 where it has none.

    Args:
        timelines: of the step `sessions`, made with the same `data.columns.signals`.
        config: `data.columns.signals` and `reward.thresholds` are used.
        objectives: names of signals.

    Raises:
        DataError: the timelines were made with other signals.
    """
    names, thresholds = list(config.data.columns.signals), config.reward.thresholds
    lengths = pc.list_value_length(timelines["items"]).to_numpy().astype(np.int64)
    items_E, levels_E, times_E, requests_E, phases_E = (
        _flat(timelines, name, np.int64) for name in ("items", "levels", "timestamps", "requests", "phases")
    )
    signals = _flat(timelines, r.SIGNALS, np.float32)
    if len(signals) != len(items_E) * len(names):
        raise DataError(
            f"the timelines do not hold the signals {', '.join(names)}",
            where="column signals",
            mend="run the step sessions with the same data.columns.signals",
        )
    signals_EF = signals.reshape(-1, len(names))
    labels_EO = np.stack([_label(signals_EF[:, names.index(name)], thresholds.get(name)) for name in objectives], axis=1)
    users_E = np.repeat(np.arange(len(lengths)), lengths)
    goes_on_E = np.zeros(len(users_E), dtype=bool)
    goes_on_E[1:] = np.all([column[1:] == column[:-1] for column in (users_E, requests_E, phases_E)], axis=0)
    starts_S = np.flatnonzero(~goes_on_E)
    firsts_S = (np.cumsum(lengths) - lengths)[users_E[starts_S]]
    is_train_E = phases_E == r.Phase.TRAIN
    return Sessions(
        items_E=items_E,
        levels_E=levels_E,
        times_E=times_E,
        users_E=users_E,
        labels_EO=labels_EO,
        rates_EO=log_odds_beside_events(items_E, labels_EO, is_train_E, users_E % FOLDS, prior=ITEM_PRIOR),
        habits_SO=log_odds_before(labels_EO, firsts_S, starts_S, mean_rates(labels_EO[is_train_E]), prior=USER_PRIOR),
        starts_S=starts_S,
        ends_S=np.append(starts_S[1:], len(users_E)),
        firsts_S=firsts_S,
        phases_S=phases_E[starts_S],
    )


def _flat(timelines: pa.Table, name: str, kind: type[_Number]) -> npt.NDArray[_Number]:
    found: npt.NDArray[_Number] = pc.list_flatten(timelines[name]).to_numpy().astype(kind)
    return found


def _label(signal_E: Floats, threshold: float | None) -> Floats:
    is_one = signal_E > 0 if threshold is None else signal_E >= threshold
    return np.where(np.isnan(signal_E), np.nan, is_one).astype(np.float32)


def session_labels(labels_BNO: Floats) -> Floats:
    """Label of a whole session: 1 where one of its items earned it, NaN where the log says nothing of any."""
    known = ~np.isnan(labels_BNO)
    best = np.where(known, labels_BNO, 0).max(axis=1)
    return np.where(known.any(axis=1), best, np.nan).astype(np.float32)


def collate(data: Sessions, sessions: Ints, *, max_behaviour: int) -> Batch:
    """Sessions with what their users did before, its latest `max_behaviour` events."""
    starts, ends, firsts = data.starts_S[sessions], data.ends_S[sessions], data.firsts_S[sessions]
    at_BN = starts[:, None] + np.arange((ends - starts).max())
    is_item_BN = at_BN < ends[:, None]
    at_BN = np.where(is_item_BN, at_BN, 0)
    longest = max(int(np.minimum(starts - firsts, max_behaviour).max()), 1)
    past_BT = starts[:, None] + np.arange(-longest, 0)
    is_past_BT = past_BT >= firsts[:, None]
    past_BT = np.where(is_past_BT, past_BT, 0)
    minutes_BT = np.maximum(data.times_E[starts][:, None] - data.times_E[past_BT], 0) / _MINUTE_MS
    return Batch(
        items_BN=np.where(is_item_BN, data.items_E[at_BN], 0),
        is_item_BN=is_item_BN,
        labels_BNO=np.where(is_item_BN[:, :, None], data.labels_EO[at_BN], np.float32(np.nan)),
        rates_BNO=data.rates_EO[at_BN],
        habits_BO=data.habits_SO[sessions],
        past_items_BT=data.items_E[past_BT],
        past_levels_BT=data.levels_E[past_BT],
        past_ages_BT=np.minimum(np.log2(1 + minutes_BT).astype(np.int64), AGES - 1),
        past_labels_BTO=data.labels_EO[past_BT],
        past_rates_BTO=data.rates_EO[past_BT],
        is_past_BT=is_past_BT,
    )


def epoch_batches(data: Sessions, sessions: Ints, *, size: int, seed: Sequence[int] | None) -> Iterator[Ints]:
    """Sessions in batches of like length: in an order drawn from the seed, or, without one, sorted by length.

    Each comes once. Within each chunk of batches they are sorted, so that a batch holds sessions that need little padding.
    """
    if len(sessions) == 0:
        return
    lengths = data.ends_S[sessions] - data.starts_S[sessions]
    before = data.starts_S[sessions] - data.firsts_S[sessions]
    if seed is None:
        order = np.lexsort((before, lengths))
        yield from np.split(sessions[order], range(size, len(order), size))
        return
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(len(sessions))
    batches: list[Ints] = []
    for chunk in np.split(drawn, range(size * _CHUNK, len(drawn), size * _CHUNK)):
        chunk = chunk[np.lexsort((before[chunk], lengths[chunk]))]
        batches += np.split(chunk, range(size, len(chunk), size))
    yield from (sessions[batches[at]] for at in rng.permutation(len(batches)))
