"""Raw logs to timelines and catalogue, sharded over Ray (`python -m components.sessions.job`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from components.sessions.catalogue import build_catalogue, catalogue_table, problems_of_items
from components.sessions.check import HINTS, event_columns
from components.sessions.shards import NO_EVENTS, NO_EVENTS_MEND, QUARANTINE_FOLDER, largest_segments, split_log, write_timelines
from components.sessions.sources import data_files, problems_of
from components.sessions.timelines import temporal_cuts
from infra import records as r
from infra import storage
from infra.cluster import quiet_ray, ray_session, unwrap
from infra.config import Config
from infra.errors import DataError, RankGRError, StorageError, raise_all
from infra.logs import get_logger
from infra.sections import DataConfig
from infra.steps import Run, StepResult, job_main, run_step, step_folder

STEP = "sessions"
CODE = ("components/sessions", "infra/records.py")
CATALOGUE_FILE = "catalogue.parquet"
TIMELINES_FOLDER = "timelines"


def prepare_sessions(config: Config, out_uri: str) -> dict[str, Any]:
    """Write `timelines/part-*.parquet`, `catalogue.parquet` and `quarantine/` below `out_uri`.

    Needs a Ray connection.

    Returns:
        counts: events, users, items, quarantined rows by reason, duplicates, and the protocol's cuts.

    Raises:
        DataError: missing columns, unreadable files, more than `max_bad_fraction` bad rows, nothing left.
        StorageError: `out_uri` cannot be written.
    """
    import ray.data  # noqa: F401 - sets its loggers up, so it comes before they are silenced

    quiet_ray(errors_too=True)
    with _errors_of_tasks():
        return _prepare_sessions(config, out_uri)


@contextmanager
def _errors_of_tasks() -> Iterator[None]:
    """Raise an error of ours as what it is, rather than wrapped by Ray."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        ours = unwrap(error)
        if isinstance(ours, RankGRError):
            raise ours from None
        raise


def _prepare_sessions(config: Config, out_uri: str) -> dict[str, Any]:
    check_sources(config.data)
    scratch_uri = storage.join(out_uri, "scratch")
    try:
        summary = split_log(config.data, config.split.positive_level, scratch_uri)
        if summary.rows == 0:
            raise DataError(NO_EVENTS, where=config.data.logs, mend=NO_EVENTS_MEND)
        quarantine_uri = storage.join(out_uri, "quarantine")
        if summary.bad:
            bad_events = storage.read_table(storage.join(scratch_uri, QUARANTINE_FOLDER))
            storage.write_table(bad_events, storage.join(quarantine_uri, "events.parquet"))
        _refuse_too_many_bad(summary.bad, summary.rows, "events", config.data, where=f"{config.data.logs}; they are in {quarantine_uri}")
        catalogue, bad_items, item_counts = build_catalogue(config.data, summary.items)
        if len(bad_items):
            storage.write_table(bad_items.to_arrow().cast(r.QUARANTINE), storage.join(quarantine_uri, "items.parquet"))
            rows = len(bad_items) + item_counts["items"] - item_counts["items_without_features"]
            reasons_of_items = Counter[str](bad_items[r.REASON].to_list())
            _refuse_too_many_bad(reasons_of_items, rows, "items", config.data, where=f"{config.data.items}; they are in {quarantine_uri}")
        cuts = temporal_cuts(summary.last_ms, config.split)
        popularity, counts = write_timelines(
            scratch_uri, sorted(summary.shards), catalogue, config, cuts, storage.join(out_uri, TIMELINES_FOLDER)
        )
    except BaseException:
        with suppress(StorageError):  # others may still write there; the next attempt removes what is left
            storage.remove(scratch_uri)
        raise
    storage.remove(scratch_uri)
    segments = largest_segments(summary.segments)
    storage.write_table(catalogue_table(catalogue, popularity.tolist(), segments), storage.join(out_uri, CATALOGUE_FILE))
    if summary.bad or len(bad_items):
        get_logger(STEP).warning("rows were quarantined", events=sum(summary.bad.values()), items=len(bad_items), where=quarantine_uri)
    return {
        "raw_rows": summary.rows,
        "quarantined": sum(summary.bad.values()),
        "reasons": dict(summary.bad),
        **counts,
        **item_counts,
        **({"segments": len(segments)} if segments else {}),
    }


def check_sources(data: DataConfig) -> None:
    """Find missing files, unreadable ones and missing columns before anything is started.

    Raises:
        DataError: all that is wrong, where, and the settings that mend it.
    """
    raise_all(problems_of_sources(data))


def problems_of_sources(data: DataConfig) -> list[RankGRError]:
    """All that `check_sources` finds."""
    return problems_of(data.logs, event_columns(data)) + problems_of_items(data)


def _refuse_too_many_bad(reasons: Counter[str], rows: int, what: str, data: DataConfig, *, where: str) -> None:
    bad = reasons.total()
    if bad == rows or bad > data.max_bad_fraction * rows:
        top = "; ".join(f"{reason}: {count}" for reason, count in reasons.most_common(3))
        hints = [HINTS[reason] for reason, _ in reasons.most_common() if reason in HINTS]
        raise DataError(
            f"{bad} of {rows} {what} are bad ({bad / rows:.1%}, allowed {data.max_bad_fraction:.1%}): {top}",
            where=where,
            mend=" or ".join([*hints, "repair the file", "raise data.max_bad_fraction"]),
        )


def step(run: Run) -> StepResult:
    """The step `sessions`: raw logs to timelines and catalogue."""
    config = run.config

    def work(out_uri: str) -> dict[str, Any]:
        with ray_session(config.cluster):
            return prepare_sessions(config, out_uri)

    return run_step(run, STEP, work, **_identity(config))


def finished(config: Config) -> storage.Manifest | None:
    """What the step made of these very logs and settings before; None if it has not."""
    return storage.read_manifest(step_folder(config.workspace, STEP, **_identity(config)))


def _identity(config: Config) -> dict[str, Any]:
    """What decides whether the step is the same work."""
    inputs = {"logs": _fingerprint(config.data.logs), "items": _fingerprint(config.data.items) if config.data.items else ""}
    settings = {"data": config.data.model_dump(exclude={"logs", "items"}), "split": config.split.model_dump()}
    return {"settings": settings, "inputs": inputs, "code": CODE}


def _fingerprint(uri: str) -> str:
    """Names, sizes and times of the files behind a URI; the logs themselves may be too large to hash."""
    _, files = data_files(uri)
    fs, _ = storage.filesystem(uri)
    seen = [fs.info(name) for name in files]
    return storage.hash_json([(i["name"], i["size"], i.get("mtime"), i.get("ETag")) for i in seen])


if __name__ == "__main__":
    job_main(step, ())
