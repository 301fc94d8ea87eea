"""What a pipeline run is given in the UI, to the configuration that its steps share: checked in the first step, all errors at once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import yaml

from components.retriever.bundle import CONFIG
from components.sessions.job import finished as sessions_of
from components.sessions.job import problems_of_sources
from infra import storage
from infra.config import PRESETS, Config, load_config
from infra.errors import ConfigError, DataError, RankGRError, in_one_line
from infra.logs import get_logger
from infra.redis_client import REDIS_URL, redis_url_of
from infra.slate_store import SlateStore
from infra.tracking import Registry

_KEPT = ("semantic_ids", "retriever", "decoding")


def resolve(preset: str, logs_uri: str, items_uri: str, overrides: Sequence[str], config: str, *, look: bool = True) -> Config:
    """The configuration: preset <- `config` <- logs and items <- overrides.

    Args:
        preset: one of `PRESETS`; empty for none.
        logs_uri: events; empty keeps `data.logs`.
        items_uri: catalogue; empty keeps `data.items`.
        overrides: `key.subkey=value` texts.
        config: settings as JSON; empty for none.
        look: at the logs, the catalogue, MLflow and Redis too.

    Raises:
        ConfigError: everything that is wrong, a line each.
    """
    problems: list[str] = []
    if preset and preset not in PRESETS:
        problems.append(f"preset: unknown preset {preset!r}, choose one of {', '.join(PRESETS)}")
        preset = ""
    base, good = _base(config, problems), [text for text in overrides if _is_readable(text, problems)]
    given = [f"data.{name}={json.dumps(uri)}" for name, uri in (("logs", logs_uri), ("items", items_uri)) if uri]
    settings = None
    try:
        settings = load_config(preset=preset or None, base=base, overrides=[*given, *good])
    except ConfigError as error:
        problems += re.split(r"; (?!did you mean)", error.what)
    if settings is not None:
        problems += _visible_passwords(settings)
    if look:
        found = _missing_files(logs_uri, items_uri) if settings is None else [*problems_of_sources(settings.data), *_services(settings)]
        problems += [in_one_line(error) for error in found]
    if problems or settings is None:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} of the parameters cannot be used:{lines}", mend="`rankgr config schema` lists every setting")
    return settings


def _base(config: str, problems: list[str]) -> dict[str, Any]:
    try:
        base = json.loads(config or "{}")
        if not isinstance(base, dict):
            raise TypeError("it is no mapping")
    except (ValueError, TypeError) as error:
        problems.append(f"config: not a JSON mapping: {error}")
        return {}
    return base


def _is_readable(text: str, problems: list[str]) -> bool:
    key, separator, value = text.partition("=")
    try:
        yaml.safe_load(value)
    except yaml.YAMLError:
        separator = ""
    if not key or not separator:
        problems.append(f"overrides: cannot read {text!r}, write key.subkey=value")
        return False
    return True


def _visible_passwords(config: Config) -> list[str]:
    """Settings travel from step to step as a parameter that everybody sees who sees the run."""
    given_as = {
        "slate_store.url": (config.slate_store.url, REDIS_URL),
        "tracking.uri": (config.tracking.uri, "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
    }
    return [
        f"{name}: holds a password, which all could read who see the run: a secret or the environment is to give it as {variables}"
        for name, (url, variables) in given_as.items()
        if _has_password(url)
    ]


def _has_password(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return "@" in url
    return bool(parts.password) or "password=" in parts.query


def _missing_files(logs_uri: str, items_uri: str) -> list[RankGRError]:
    """The settings are wrong already, but a missing file is known now."""
    found: list[RankGRError] = []
    for name, uri in (("logs_uri", logs_uri), ("items_uri", items_uri)):
        try:
            if uri and not storage.exists(uri):
                found.append(DataError(f"{name}: the path does not exist", where=uri))
        except RankGRError as error:
            found.append(error)
    return found


def _services(config: Config) -> list[RankGRError]:
    """What does not answer of that which the last steps need, now rather than after the training."""
    found: list[RankGRError] = []
    try:
        if config.tracking.uri or not storage.is_local(config.workspace):  # a database in the workspace is made when it is needed
            Registry(config.tracking, config.workspace)
    except RankGRError as error:
        found.append(error)
    try:
        with SlateStore.of(config.slate_store, redis_url_of(config.slate_store)) as store:
            store.ping()
    except RankGRError as error:
        found.append(error)
    return found


def refreshed(config: Config) -> Config:
    """Settings for a run on newer logs that goes on from the champion.

    The champion's items keep their SIDs and new ones are encoded on its codebooks; training starts from its weights. Model, SIDs and
    decoding are as the champion's. Weights that a stream was trained on have seen events that the run is judged by: then training
    starts afresh. Where the champion came of these very logs and training settings, its own settings are returned, so that its steps
    are skipped and only what a run that died had left undone is done.

    Raises:
        ConfigError: there is no champion.
    """
    champion = Registry(config.tracking, config.workspace).champion()
    if champion is None:
        raise ConfigError("there is no champion to go on from", where=config.workspace, mend="run the training pipeline first")
    own = Config.from_json(storage.read_bytes(storage.join(champion.bundle_uri, CONFIG)).decode())
    made_of = storage.open_committed(champion.bundle_uri, verify=False).metadata
    if _knows_all(config, own, made_of):
        get_logger("pipeline").info("the champion was trained on these very logs: nothing is trained again", champion=champion.bundle_uri)
        kept = {name: getattr(own, name) for name in (*_KEPT, "training")}
        return Config.from_json(config.model_copy(update=kept).to_json())
    streamed = "streaming" in made_of
    if streamed:
        get_logger("pipeline").warning("the champion went on learning from a stream: training starts from fresh weights")
    sids = own.semantic_ids.model_copy(update={"earlier": champion.bundle_uri, "freeze": True, "workers": config.semantic_ids.workers})
    training = config.training.model_copy(update={"start_from": "" if streamed else champion.bundle_uri})
    kept = {name: getattr(own, name) for name in _KEPT} | {"semantic_ids": sids, "training": training}
    return Config.from_json(config.model_copy(update=kept).to_json())


def _knows_all(config: Config, own: Config, made_of: Mapping[str, Any]) -> bool:
    """Whether the champion was trained on the logs as they are now, as they would be trained on now."""
    prepared = sessions_of(config)
    same_logs = prepared is not None and prepared.digest == made_of.get("inputs", {}).get("sessions")
    same_training = config.training.model_copy(update={"start_from": own.training.start_from}) == own.training
    began_with = {own.semantic_ids.earlier, own.training.start_from} - {""}
    return same_logs and same_training and all(storage.read_manifest(uri) is not None for uri in began_with)
