"""Errors say what, where and how to mend it, and travel."""

from __future__ import annotations

import pickle

import pytest

from infra import errors
from infra.errors import DataError, RankGRError, describe, raise_described

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RankGRError)]


def test_each_kind_has_an_exit_code_of_its_own() -> None:
    assert sorted(kind.exit_code for kind in KINDS) == [1, 2, 3, 4, 5, 6, 7]


def test_the_message_has_a_line_for_each_part() -> None:
    assert str(DataError("broken", where="here", mend="repair it")) == "broken\n  where: here\n  mend:  repair it"
    assert str(DataError("broken")) == "broken"
    error = DataError("broken", mend="repair it")
    error.notes.append("another one too")
    assert str(error) == "broken\n  mend:  repair it\n  also:  another one too"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_pickling(kind: type[RankGRError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("what", where="there", mend="so")))  # noqa: S301 - our own bytes
    assert type(copy) is kind
    assert (copy.what, copy.where, copy.mend) == ("what", "there", "so")


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_json(kind: type[RankGRError]) -> None:
    with pytest.raises(RankGRError) as caught:
        raise_described(describe(kind("what", where="there", mend="so")))
    assert type(caught.value) is kind
    assert str(caught.value) == "what\n  where: there\n  mend:  so"
