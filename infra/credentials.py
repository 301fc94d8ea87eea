"""Secrets by reference: settings name an environment variable or a file, and never hold the secret itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field

from infra.errors import ConfigError

SecretRef = Annotated[str, Field(pattern=r"^((env:[A-Za-z_][A-Za-z0-9_]*)|(file:.+))?$")]
"""`env:NAME` or `file:PATH`; empty: none."""


def without_password(url: str) -> str:
    """A URL fit for logs and messages: no user, password or query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def holds_password(text: str) -> bool:
    """Whether a text is a URL with a password."""
    if "://" not in text:
        return False
    try:
        parts = urlsplit(text)
    except ValueError:
        return "@" in text
    return bool(parts.password) or "password=" in parts.query


def read_secret(reference: str, setting: str) -> str:
    """The secret behind a reference.

    Args:
        reference: `env:NAME` or `file:PATH`.
        setting: the setting that holds the reference, for the message.

    Raises:
        ConfigError: the variable is not set, the file cannot be read, or there is nothing in it.
    """
    kind, _, name = reference.partition(":")
    try:
        secret = os.environ.get(name, "") if kind == "env" else Path(name).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the file with a secret cannot be read", where=f"{setting}: {name}", mend="check its path and mode") from error
    if not secret:
        raise ConfigError(f"{reference} holds no secret", where=setting, mend="set the variable, or write the file, before the start")
    return secret
