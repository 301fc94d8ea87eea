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


def test_a_swap_goes_on_in_turns_with_rests_of_which_the_loop_waits_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now, log, found = [100.0], list[str](), Swaps(1)
    monkeypatch.setattr(serve.time, "time", lambda: now[0])
    monkeypatch.setattr(serve.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def passes(seconds: float, name: str) -> Any:
        return lambda *_: (now.__setitem__(0, now[0] + seconds), log.append(name), ["stored"])[-1]

    share = 0.2
    service = InTurns(SimpleNamespace(hold=passes(2, "hold"), show=passes(1, "show"), compute=passes(20, "compute")), found, share)

    def once() -> bool:
        service.hold({})
        for wait in (5, 12, 0):
            assert service.compute([]) == ["stored"]
            now[0] += wait
        service.show("uri", "version")
        return True

    service.swap(SimpleNamespace(once=once))
    assert log == ["hold", "compute", "compute", "compute", "show"]
    assert found.swaps == [(100.0, 147.0), (162.0, 183.0)]  # 2 + 20 + 5 + 20; a rest of 15: 3, and 12 of the loop; 20 + 1
    assert found.pauses == [(147.0, 162.0)]
