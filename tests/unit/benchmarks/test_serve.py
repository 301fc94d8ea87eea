"""What the benchmark of the service counts as wrong."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.benchmarks import serve
from tests.benchmarks.serve import InTurns, Swaps, _gone_back, _windows
from tests.benchmarks.serve_world import Measured

OLD, NEW, NONE = 0, 1, -1


def measured(*answers: tuple[float, int]) -> Measured:
    """Answers of a millisecond each: when they were asked for, and their version."""
    at, version = (np.array(column) for column in zip(*answers, strict=True))
    zeros = np.zeros(len(at), np.int64)
    status = np.where(version == NONE, 0, 200)
    return Measured(at, np.full(len(at), 1e-3), status, zeros, version, zeros, zeros.astype(bool), np.array(["old", "new"]))


@pytest.mark.parametrize(
    ("answers", "wrong"),
    [
        ([(1.0, OLD), (2.0, NEW), (3.0, NEW)], 0),
        ([(1.0, OLD), (2.0, NEW), (3.0, OLD), (4.0, OLD)], 2),
        ([(1.0, NONE), (2.0, OLD), (3.0, NEW)], 0),  # what failed saw no version
        ([(1.0, OLD), (2.0, NEW), (2.0005, OLD)], 0),  # asked for before the first new one had come
        ([(1.0, OLD)], 0),
        ([(1.0, NONE)], 0),
    ],
)
def test_who_asks_after_a_new_version_was_seen_must_not_get_the_old_one(answers: list[tuple[float, int]], wrong: int) -> None:
    assert _gone_back(measured(*answers), "old", "new") == wrong


@pytest.mark.parametrize(("seconds", "windows"), [(2.0, 1), (5.0, 1), (12.0, 2), (13.0, 3)])
def test_windows_leave_nothing_of_a_time_out(seconds: float, windows: int) -> None:
    found = list(_windows(100.0, 100.0 + seconds))
    assert len(found) == windows
    assert (found[0][0], found[-1][1]) == (100.0, 100.0 + seconds)
    assert all(before[1] == after[0] for before, after in pairwise(found))


def test_a_swap_goes_on_in_turns_with_rests_which_leave_to_it_what_the_loop_waits_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    now, log, found = [100.0], list[str](), Swaps(1)

    def passes(seconds: float, name: str = "") -> Any:
        return lambda *_: (now.__setitem__(0, now[0] + seconds), log.append(name), ["stored"])[-1]

    monkeypatch.setattr(serve, "time", SimpleNamespace(time=lambda: now[0], sleep=lambda seconds: passes(seconds)()))
    inner = SimpleNamespace(hold=passes(2, "hold"), show=passes(1, "show"), compute=passes(16, "compute"))
    service = InTurns(inner, found, 0.2)

    def once() -> bool:
        service.hold({})
        for times in (4, 4, 4, 0):  # as `Sync` waits with a share of .2: behind the last slates not at all
            began = now[0]
            assert service.compute([]) == ["stored"]
            now[0] += times * (now[0] - began)
        service.show("uri", "version")
        return True

    service.swap(SimpleNamespace(once=once))
    assert [name for name in log if name] == ["hold", *4 * ["compute"], "show"]
    assert found.rests == [(262.0, 277.0)]
    assert found.swaps == [(100.0, 262.0), (277.0, 377.0)]  # 2 + 16 + 64 + 16 + 64, a rest of 15; 16 + 64 + 16 + 3 + 1
