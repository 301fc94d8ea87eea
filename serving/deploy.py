"""The application for `serve deploy` and `serve run`: a builder that Ray Serve calls, and the file that names it.

    rankgr serve --write-config serve.yaml     # the champion of this workspace, as configured
    serve deploy serve.yaml                    # to a running Ray cluster; `serve run serve.yaml` beside a terminal

Bundle and Redis must be within the cluster's reach, and secrets in its environment. Deployed again with another bundle, Ray
Serve replaces the replicas, for the arguments have changed; slates of the new version come from `rankgr precompute`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from components.precompute.job import with_bundle_settings
from components.retriever.bundle import verified_version
from infra.config import Config, load_config
from infra.errors import ConfigError
from serving.app import APP, LOGGING, build_app
from serving.auth import token_digests

REDIS_URL = "RANKGR_REDIS_URL"
_IMPORT_PATH = "serving.deploy:build"


class Target(BaseModel):
    """What the file says of the application.

    Attributes:
        bundle: URI of the served bundle.
        redis_url: the slate store; empty: RANKGR_REDIS_URL in the cluster's environment.
        settings: sections of the configuration; what is left out has its default, or is the bundle's.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: str
    redis_url: str = ""
    settings: dict[str, Any] = {}


def build(args: dict[str, Any]) -> Any:
    """The Serve application; called by Ray Serve in the cluster with the file's `args`.

    Raises:
        ConfigError: the arguments or the settings are not valid, or no Redis is named.
        IntegrityError: the bundle is damaged.
    """
    try:
        target = Target.model_validate(args)
    except ValidationError as error:
        raise ConfigError(f"the arguments of {_IMPORT_PATH} are not valid: {error}", mend="rankgr serve --write-config FILE") from error
    redis_url = target.redis_url or os.environ.get(REDIS_URL, "")
    if not redis_url:
        raise ConfigError("no Redis is named", where="args.redis_url", mend=f"write it into the file, or set {REDIS_URL} in the cluster")
    config = load_config(base=target.settings)
    version = verified_version(target.bundle)  # before anything of the bundle is read
    return build_app(with_bundle_settings(config, target.bundle), target.bundle, redis_url, version=version)


def serve_file(config: Config, bundle_uri: str) -> str:
    """The file for `serve deploy`, as YAML.

    Args:
        config: `serving`, `slate_store` and `streaming` go into the file; a Redis URL that holds a password does not.
        bundle_uri: to serve.

    Raises:
        ConfigError: the service would be open to other machines without a token.
    """
    token_digests(config.serving)
    sections = config.model_dump(mode="json", include={"serving", "slate_store", "streaming"})
    redis_url = sections["slate_store"].pop("url")
    is_public = not (urlsplit(redis_url).username or urlsplit(redis_url).password or urlsplit(redis_url).query)
    target = Target(bundle=bundle_uri, redis_url=redis_url if is_public else "", settings=sections)
    content: Mapping[str, Any] = {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.serving.host, "port": config.serving.port},
        "logging_config": LOGGING,
        "applications": [{"name": APP, "route_prefix": "/", "import_path": _IMPORT_PATH, "args": target.model_dump()}],
    }
    return yaml.safe_dump(content, sort_keys=False)
