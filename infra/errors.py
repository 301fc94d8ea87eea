"""Every error a user can meet, as a tree; each class has its own process exit code.

RankGRError            1
├── ConfigError        2   an unknown key, a value out of range, a missing option
├── DataError          3   the logs or the items are not usable: column, type, too many bad rows, nothing left
├── StorageError       4   a path that is missing or not writable, disk full
├── IntegrityError     5   a hash, a commit marker or a SID table that does not match
├── ServiceError       6   Redis, Ray, MLflow or a port that is not available
└── TrainingError      7   a loss that is not finite, a worker that keeps failing

A message says what is wrong, where, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MOST_TOLD = 20
"""Errors that a person reads at once; of more the number is told."""


class RankGRError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: what is wrong, in one sentence.
        where: file, column, key or address concerned.
        mend: what the user can do about it.

    Attributes:
        notes: what went wrong beside it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        self.notes: list[str] = []
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        if self.where:
            parts.append(f"  where: {self.where}")
        if self.mend:
            parts.append(f"  mend:  {self.mend}")
        return "\n".join([*parts, *(f"  also:  {note}" for note in self.notes)])

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel between Ray workers and the driver; keyword arguments need help there.
        return (_rebuild, (type(self), self.what, self.where, self.mend))


class ConfigError(RankGRError):
    exit_code = 2


class DataError(RankGRError):
    exit_code = 3


class StorageError(RankGRError):
    exit_code = 4


class IntegrityError(RankGRError):
    exit_code = 5


class ServiceError(RankGRError):
    exit_code = 6


class TrainingError(RankGRError):
    exit_code = 7


def _rebuild(kind: type[RankGRError], what: str, where: str, mend: str) -> RankGRError:
    return kind(what, where=where, mend=mend)


def in_one_line(error: RankGRError) -> str:
    """An error as one of several: what (where): how to mend it."""
    where, mend = f" ({error.where})" if error.where else "", f": {error.mend}" if error.mend else ""
    return f"{error.what}{where}{mend}"


def as_list(lines: Sequence[str]) -> str:
    """Lines of a message, no more than a person reads."""
    more = [f"\n  and {len(lines) - MOST_TOLD} more"] if len(lines) > MOST_TOLD else []
    return "".join([*(f"\n  - {line}" for line in lines[:MOST_TOLD]), *more])


def raise_all(found: Sequence[RankGRError]) -> None:
    """Raise what was found, several errors as one of the first one's kind that says them all; nothing if there are none."""
    if len(found) == 1:
        raise found[0]
    if found:
        raise type(found[0])(f"{len(found)} things are wrong:{as_list([in_one_line(error) for error in found])}")


def describe(error: RankGRError) -> dict[str, str]:
    """An error as strings, for JSON."""
    return {"kind": type(error).__name__, "what": error.what, "where": error.where, "mend": error.mend}


def raise_described(saved: Mapping[str, str], notes: Sequence[str] = ()) -> None:
    """Raise the error that `describe` put down, with notes of what went wrong beside it."""
    error: RankGRError = globals()[saved["kind"]](saved["what"], where=saved["where"], mend=saved["mend"])
    error.notes.extend(notes)
    raise error
