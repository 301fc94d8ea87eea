"""What a pipeline run is given in the UI, to the configuration that its steps share: checked in the first step, all errors at once."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import yaml

from components.retriever.bundle import CONFIG
from components.sessions.job import check_sources
from infra import storage
from infra.config import PRESETS, Config, load_config
from infra.errors import ConfigError, RankGRError
from infra.logs import get_logger
from infra.tracking import Registry

_KEPT = ("semantic_ids", "retriever", "decoding")


def resolve(preset: str, logs_uri: str, items_uri: str, overrides: Sequence[str], config: str, *, read_data: bool = True) -> Config:
    """The configuration: preset <- `config` <- logs and items <- overrides.

    Args:
        preset: one of `PRESETS`; empty for none.
        logs_uri: events; empty keeps `data.logs`.
        items_uri: catalogue; empty keeps `data.items`.
        overrides: `key.subkey=value` texts.
        config: settings as JSON; empty for none.
        read_data: look at the logs and the catalogue too.

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
    if read_data:
        problems += _data_problems(settings, logs_uri, items_uri)
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


def _data_problems(settings: Config | None, logs_uri: str, items_uri: str) -> list[str]:
    if settings is not None:
        try:
            check_sources(settings.data)
        except RankGRError as error:
            return [f"{error.what} ({error.where}): {error.mend}"]
        return []
    found = []  # the settings are wrong already, but a missing file is known now
    for name, uri in (("logs_uri", logs_uri), ("items_uri", items_uri)):
        try:
            if uri and not storage.exists(uri):
                found.append(f"{name}: the path does not exist ({uri})")
        except RankGRError as error:
            found.append(f"{name}: {error.what} ({error.where})")
    return found


def refreshed(config: Config) -> Config:
    """Settings for a run on newer logs that goes on from the champion.

    The champion's items keep their SIDs and new ones are encoded on its codebooks; training starts from its weights. Model, SIDs and
    decoding are as the champion's. Weights that a stream was trained on have seen events that the run is judged by: then training
    starts afresh.

    Raises:
        ConfigError: there is no champion.
    """
    champion = Registry(config.tracking, config.workspace).champion()
    if champion is None:
        raise ConfigError("there is no champion to go on from", where=config.workspace, mend="run the training pipeline first")
    own = Config.from_json(storage.read_bytes(storage.join(champion.bundle_uri, CONFIG)).decode())
    streamed = "streaming" in storage.open_committed(champion.bundle_uri, verify=False).metadata
    if streamed:
        get_logger("pipeline").warning("the champion went on learning from a stream: training starts from fresh weights")
    sids = own.semantic_ids.model_copy(update={"earlier": champion.bundle_uri, "freeze": True, "workers": config.semantic_ids.workers})
    training = config.training.model_copy(update={"start_from": "" if streamed else champion.bundle_uri})
    kept = {name: getattr(own, name) for name in _KEPT} | {"semantic_ids": sids, "training": training}
    return Config.from_json(config.model_copy(update=kept).to_json())
