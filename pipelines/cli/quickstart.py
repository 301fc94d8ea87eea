"""`rankgr quickstart`: the main job from raw logs to served slates."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer
import yaml

from infra import storage
from infra.config import Config
from infra.errors import ConfigError
from infra.logs import get_logger
from infra.steps import StepResult
from pipelines import movielens
from pipelines.cli.common import ConfigFile, DryRun, Fresh, Items, Logs, Overrides, Preset, announce, settings_of
from pipelines.cli.show import print_figures, print_slates
from pipelines.local_run import local_services, new_run_id, redis_url, run_pipeline

_SHOWN_USERS, _SHOWN_HISTORY, _SHOWN_ITEMS = 3, 5, 5

Column = Annotated[str | None, typer.Option(help="Name of this column in your log.")]


def quickstart(
    logs: Logs = None,
    items: Items = None,
    columns: Annotated[Path | None, typer.Option("--columns", help="YAML file that maps columns: `user_id: uid`, ...")] = None,
    user_column: Column = None,
    item_column: Column = None,
    time_column: Column = None,
    level_column: Column = None,
    time_unit: Annotated[str | None, typer.Option(help="Unit of the timestamps: ms, s or us.")] = None,
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
) -> None:
    """Run everything on this machine, on MovieLens-100K or your own logs, and show three users' slates.

    Examples: `rankgr quickstart`, `rankgr quickstart --logs events.csv --items items.csv --user-column uid --time-unit s`
    """
    flags = {"user_id": user_column, "item_id": item_column, "timestamp": time_column, "level": level_column}
    load = partial(settings_of, config, preset, overrides, logs=logs, items=items, default_preset="small")
    settings = load(mapped=_mapped(columns, flags, time_unit))
    if not settings.data.logs:
        settings = load(base=movielens.SETTINGS)
    if dry_run:
        announce(
            settings, ["fetch MovieLens-100K" if not settings.data.logs else f"read {settings.data.logs}", "run the pipeline", "serve"]
        )
        return
    if not settings.data.logs:
        events, films = movielens.fetch(movielens.FOLDER)
        settings = _with_data(settings, events, films)
    _run(settings, fresh=fresh)


def _mapped(columns: Path | None, flags: Mapping[str, str | None], unit: str | None) -> list[str]:
    """Settings that follow from the column file and, above it, the column flags."""
    mapping: dict[str, Any] = {}
    if columns is not None:
        try:
            mapping = dict(yaml.safe_load(columns.read_text("utf-8")) or {})
        except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"the column file cannot be read: {error}", where=str(columns), mend="write `user_id: uid` lines") from error
    mapping |= {name: value for name, value in flags.items() if value}
    given = [f"data.columns.{name}={json.dumps(value)}" for name, value in mapping.items()]
    return given + ([f"data.timestamp_unit={unit}"] if unit else [])


def _with_data(settings: Config, logs: Path, items: Path) -> Config:
    files = {"logs": str(logs.resolve()), "items": str(items.resolve())}
    return settings.model_copy(update={"data": settings.data.model_copy(update=files)})


def _run(settings: Config, *, fresh: bool) -> None:
    from components.sessions.job import check_sources

    start, outside_ray = time.monotonic(), "RAY_ADDRESS" in os.environ
    check_sources(settings.data)
    with local_services(settings):
        records = run_pipeline(settings, run_id=new_run_id(), fresh=fresh)
        users = _served_users(settings, records, outside_ray=outside_ray) if "release" in records else []
    if users:
        print_slates(users)
    print_figures(settings, records)
    get_logger("quickstart").info("done", seconds=round(time.monotonic() - start, 1))


def _served_users(settings: Config, records: Mapping[str, StepResult], *, outside_ray: bool) -> list[dict[str, Any]]:
    """Histories and slates of some users, asked for over HTTP as any client would."""
    from serving.app import start

    bundle = storage.join(records["release"].uri, "bundle")
    version = records["release"].metadata["version"]
    # What is stored is read, nothing is computed: no model replica is waited for.
    serving = settings.serving.model_copy(update={"port": 0, "precompute_min_replicas": 0})
    free = settings.model_copy(update={"serving": serving})
    examples = storage.read_json(storage.join(records["evaluation"].uri, "examples.json"))
    own_cluster = not (settings.cluster.address or outside_ray)
    service = start(free, bundle, redis_url(settings), version=version, ends_with_cluster=own_cluster)
    with service as url, httpx.Client(base_url=url, timeout=30) as client:
        users = []
        for user in [example["user_id"] for example in examples[:_SHOWN_USERS]]:
            path = f"/v1/users/{quote(user, safe='')}"
            history = client.get(f"{path}/history").raise_for_status().json()
            slate = client.get(f"{path}/slate", params={"k": _SHOWN_ITEMS}).raise_for_status().json()
            users.append(
                {
                    "user_id": user,
                    "source": slate["source"],
                    "history": [item["title"] for item in history["events"][-_SHOWN_HISTORY:]],
                    "slate": [f"{item['title']}  {item['score']:.2f}" for item in slate["items"]],
                }
            )
    return users
