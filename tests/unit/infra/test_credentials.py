"""Secrets are referred to, never written down; Redis' access rules and TLS follow from the settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.config import load_config
from infra.credentials import read_secret
from infra.errors import ConfigError
from infra.redis_client import access_of
from infra.service_sections import SlateStoreConfig


def test_a_secret_is_read_from_the_environment_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_SECRET", "hush")
    (tmp_path / "secret").write_text("hush too\n")
    assert read_secret("env:SOME_SECRET", "a.b") == "hush"
    assert read_secret(f"file:{tmp_path / 'secret'}", "a.b") == "hush too"


def test_a_reference_that_leads_nowhere_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SOME_SECRET", raising=False)
    (tmp_path / "empty").touch()
    for reference in ("env:SOME_SECRET", f"file:{tmp_path / 'none'}", f"file:{tmp_path / 'empty'}"):
        with pytest.raises(ConfigError) as caught:
            read_secret(reference, "a.b")
        assert "a.b" in caught.value.where


@pytest.mark.parametrize("key", ["slate_store.password", "slate_store.username", "serving.tokens"])
def test_a_secret_in_the_configuration_is_refused_and_not_repeated(key: str) -> None:
    value = "[plain-secret]" if key == "serving.tokens" else "plain-secret"
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[f"{key}={value}"])
    assert "plain-secret" not in str(caught.value)


def test_access_to_redis_follows_from_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_USER", "rankgr")
    monkeypatch.setenv("REDIS_PASSWORD", "hush")
    config = SlateStoreConfig(username="env:REDIS_USER", password="env:REDIS_PASSWORD", ca_file="/etc/ca.pem")  # noqa: S106 - a reference
    expected = {"username": "rankgr", "password": "hush", "ssl_ca_certs": "/etc/ca.pem"}
    assert access_of(config, "rediss://redis.example:6380/0") == expected
    with pytest.raises(ConfigError, match="not rediss"):
        access_of(config, "redis://redis.example:6379/0")
    assert access_of(SlateStoreConfig(), "redis://redis.example") == {}
