"""`rankgr serve` and `rankgr recommend`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from infra import storage
from infra.config import Config
from infra.errors import DataError
from infra.local import require_port
from infra.slate_store import SlateStore
from infra.steps import latest_run
from infra.tracking import Registry
from pipelines.cli.common import ConfigFile, DryRun, Overrides, Preset, announce, console, settings_of
from pipelines.local_run import local_services, redis_url

_WAKE_S = 0.5


def serve(
    write_config: Annotated[str | None, typer.Option("--write-config", metavar="FILE", help="Write a file for `serve deploy`.")] = None,
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Serve the champion's slates over HTTP until Ctrl-C, or write the file with which a Ray cluster does.

    Example: `rankgr serve --set serving.port=9000`, then `curl localhost:9000/v1/users/1/slate?k=5`
    """
    from components.precompute.job import with_bundle_settings
    from components.retriever.bundle import verified_version
    from serving.app import start
    from serving.auth import token_digests
    from serving.deploy import serve_file

    settings = settings_of(config, preset, overrides)
    bundle = Registry(settings.tracking, settings.workspace).require_champion().bundle_uri
    token_digests(settings.serving)
    if dry_run:
        what = f"serve {bundle} on {settings.serving.host}:{settings.serving.port}"
        announce(settings, [what if write_config is None else f"write {write_config}, which has Ray {what}"])
        return
    if write_config is not None:
        storage.write_bytes(write_config, serve_file(settings, bundle).encode())
        sys.stdout.write(f"{write_config} is written; next: serve deploy {write_config}\n")
        return
    version = verified_version(bundle)
    settings = with_bundle_settings(settings, bundle)
    if settings.serving.port:  # before Ray takes its seconds to start
        require_port(settings.serving.host, settings.serving.port, setting="serving.port")
    with (
        local_services(settings, niceness=0),
        start(settings, bundle, redis_url(settings), version=version) as url,
        _in_step(settings, bundle, version),
    ):
        sys.stdout.write(f"serving on {url}, API at {url}/docs, Ctrl-C ends\n")
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):  # the way it is meant to end
            while True:  # signal.pause would miss a signal that the kernel hands to another thread
                time.sleep(_WAKE_S)


def recommend(
    user: Annotated[str, typer.Argument(metavar="USER", help="User id as in the logs.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many items.")] = 10,
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Decode the champion's slate for a user of the last run, without any service.

    Example: `rankgr recommend 42 -k 5`
    """
    settings = settings_of(config, preset, overrides)
    bundle_uri = Registry(settings.tracking, settings.workspace).require_champion().bundle_uri
    if dry_run:
        announce(settings, [f"decode {k} items for user {user} with {bundle_uri}"])
        return
    import pyarrow.compute as pc

    from components.precompute.job import history_of
    from components.retriever.bundle import load_bundle

    _, records = latest_run(settings.workspace)
    timelines = storage.read_table(storage.join(records["sessions"].uri, "timelines"))
    row = timelines.filter(pc.equal(timelines["user_id"], user)).to_pylist()
    if not row:
        raise DataError(f"user {user!r} is not in the logs", where=records["sessions"].uri, mend="check the id; ids are strings")
    bundle = load_bundle(bundle_uri)
    # The last run may have had another catalogue than the champion: items go by their ids.
    ids = storage.read_table(storage.join(records["sessions"].uri, "catalogue.parquet"))["item_id"].to_pylist()
    index = {item_id: i for i, item_id in enumerate(bundle.item_ids)}
    known = [(index[ids[i]], level) for i, level in zip(row[0]["items"], row[0]["levels"], strict=True) if ids[i] in index]
    history = history_of([i for i, _ in known], [level for _, level in known], bundle.config.retriever.history_min_level)
    ranked = bundle.recommender().recommend([history], k, exclude_seen=bundle.config.decoding.exclude_seen)[0]
    table = Table(title=f"user {user}, {len(history.items)} items of history, model {bundle.version}")
    for column in ("rank", "item", "title", "score"):
        table.add_column(column)
    for place, (item, score) in enumerate(zip(ranked.items, ranked.scores, strict=True), 1):
        table.add_row(str(place), escape(bundle.item_ids[item]), escape(bundle.titles[item]), f"{score:.3f}")
    console.print(table)


@contextmanager
def _in_step(settings: Config, bundle: str, version: str) -> Iterator[None]:
    """Follow the registry's champion while the service runs."""
    from components.retriever.bundle import verified_version
    from serving.app import LiveService
    from serving.sync import Sync, in_step

    def champion() -> str | None:
        found = Registry(settings.tracking, settings.workspace).champion()
        return found.bundle_uri if found else None

    url, size = redis_url(settings), settings.decoding.slate_size
    with SlateStore.of(settings.slate_store, url) as store, closing(LiveService(settings, url)) as service:
        share = settings.serving.refresh_share
        sync = Sync(service, store, champion, bundle_uri=bundle, version=version, slate_size=size, share=share, verify=verified_version)
        with in_step(sync, settings.serving.sync_minutes * 60):
            yield
