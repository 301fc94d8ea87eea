"""What a pipeline run is given in the UI, to the configuration that its steps share: checked in the first step, all errors at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from components.retriever.bundle import CONFIG
from components.sessions.job import finished as sessions_of
from components.sessions.job import problems_of_sources
from infra import storage
from infra.config import PRESETS, Config, load_config
from infra.credentials import holds_password
from infra.errors import ConfigError, DataError, IntegrityError, RankGRError, as_list, in_one_line
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
    passwords = visible_passwords(settings) if settings is not None else []
    problems += passwords
    if look:
        found = _missing_files(logs_uri, items_uri) if settings is None else problems_of_sources(settings.data)
        found += _services(settings) if settings is not None and not passwords else []
        problems += [in_one_line(error) for error in found]
    if problems or settings is None:
        what = f"{len(problems)} of the parameters cannot be used:{as_list(problems)}"
        raise ConfigError(what, mend="`rankgr config schema` lists every setting")
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


def refuse_visible_passwords(config: Config) -> None:
    """Raise `ConfigError` where `visible_passwords` finds some."""
    if problems := visible_passwords(config):
        raise ConfigError("; ".join(problems), where="the settings")


def visible_passwords(config: Config) -> list[str]:
    """URLs with passwords: settings travel from step to step as a parameter that everybody sees who sees the run."""
    variables = {"slate_store.url": f" as {REDIS_URL}", "tracking.uri": " as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"}
    return [
        f"{name}: holds a password, which all could read who see the run: the secret or the environment gives it{variables.get(name, '')}"
        for name, value in _texts(config.model_dump(mode="json"))
        if holds_password(value)
    ]


def _texts(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Name and value of every setting that is a text, those in lists too."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _texts(value, f"{above}{name}.")
        else:
            yield from ((f"{above}{name}", one) for one in (value if isinstance(value, list) else [value]) if isinstance(one, str))


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
    if config.cluster.jobs_url:
        return found  # slates are written from the cluster, which may have a Redis that these steps do not see
    try:
        with SlateStore.of(config.slate_store, redis_url_of(config.slate_store)) as store:
            store.ping()
    except RankGRError as error:
        found.append(error)
    return found


def refreshed(config: Config, *, fresh: bool = False) -> Config:
    """Settings for a run on newer logs that goes on from the champion.

    The champion's items keep their SIDs and new ones are encoded on its codebooks; training starts from its weights. Model, SIDs and
    decoding are as the champion's. Weights that a stream was trained on have seen events that the run is judged by: then training
    starts afresh. Where the champion came of these very logs and settings, and its steps lie there, its own settings are returned, so
    that they are skipped and only what a run that died had left undone is done.

    Args:
        config: of the run.
        fresh: everything is to be done anew.

    Raises:
        ConfigError: there is no champion.
    """
    champion = Registry(config.tracking, config.workspace).champion()
    if champion is None:
        raise ConfigError("there is no champion to go on from", where=config.workspace, mend="run the training pipeline first")
    own = Config.from_json(storage.read_bytes(storage.join(champion.bundle_uri, CONFIG)).decode())
    made_of = storage.open_committed(champion.bundle_uri, verify=False).metadata
    same = Config.from_json(config.model_copy(update={name: getattr(own, name) for name in (*_KEPT, "training")}).to_json())
    asked = config.training.model_copy(update={"start_from": own.training.start_from})
    if not fresh and asked == own.training and config.seed == own.seed and _knows_all(same, made_of):
        get_logger("pipeline").info("the champion was trained on these very logs: nothing is trained again", champion=champion.bundle_uri)
        return same
    streamed = "streaming" in made_of
    if streamed:
        get_logger("pipeline").warning("the champion went on learning from a stream: training starts from fresh weights")
    sids = own.semantic_ids.model_copy(update={"earlier": champion.bundle_uri, "freeze": True, "workers": config.semantic_ids.workers})
    training = config.training.model_copy(update={"start_from": "" if streamed else champion.bundle_uri})
    kept = {name: getattr(own, name) for name in _KEPT} | {"semantic_ids": sids, "training": training}
    return Config.from_json(config.model_copy(update=kept).to_json())


def _knows_all(kept: Config, made_of: Mapping[str, Any]) -> bool:
    """Whether a champion came of the logs as they are now, and its steps lie there finished.

    Args:
        kept: settings of the run, with those that decide on SIDs and weights as the champion's.
        made_of: metadata of its bundle.
    """
    from components.semantic_ids.job import finished as sids_of
    from components.training.job import finished as training_of

    sessions = sessions_of(kept)
    if sessions is None or sessions.digest != made_of.get("inputs", {}).get("sessions"):
        return False
    try:
        sids = sids_of(kept, sessions.digest)
    except IntegrityError:  # what the champion had begun with is gone
        return False
    return sids is not None and training_of(kept, sessions.digest, sids.digest) is not None
