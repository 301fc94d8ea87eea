"""Tokens over HTTP: every route that is no read asks for one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from infra.config import load_config
from infra.errors import ConfigError
from infra.local import free_port
from infra.slate_store import AsyncSlateReader
from serving.api import create_api
from serving.auth import token_digests
from serving.retrieval import Retrieval

TOKENS = ("first-token-0123456789", "second-token-0123456789")


def settings(*overrides: str) -> list[str]:
    return token_digests(load_config(overrides=overrides).serving)


def test_behind_haproxy_a_token_is_needed_on_loopback_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings("serving.host=127.0.0.1") == []
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ConfigError, match="opens the service to other machines"):
        settings("serving.host=127.0.0.1")


def test_every_route_that_is_no_read_asks_for_a_token(tmp_path: Path) -> None:
    references = []
    for number, token in enumerate(TOKENS):
        (tmp_path / str(number)).write_text(f"{token}\n")
        references.append(f"file:{tmp_path / str(number)}")
    digests = settings(f"serving.tokens=[{','.join(references)}]")
    assert not any(token in digest for token in TOKENS for digest in digests)

    async def story() -> None:
        async with AsyncSlateReader(f"redis://127.0.0.1:{free_port()}") as reader:
            api = create_api(Retrieval(reader, None, slate_size=5), slate_size=5, token_digests=digests)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as client:
                routes = [(method, path) for path, methods in api.openapi()["paths"].items() for method in methods]
                mutating = [(method, path) for method, path in routes if method != "get"]
                assert len(mutating) >= 2
                for method, path in [*mutating, ("delete", "/nowhere"), ("get", "/v1/users")]:
                    for header in (None, "Bearer ", "Bearer wrong", f"Basic {TOKENS[0]}", f"Bearer {TOKENS[0]}x", "Bearer ü"):
                        given = {"Authorization": header.encode()} if header else {}
                        refused = await client.request(method.upper(), path, headers=given, content=b"{")
                        assert refused.status_code == 401, (method, path, header)
                        assert refused.headers["WWW-Authenticate"].startswith("Bearer")
                        assert set(refused.json()) == {"what", "mend"}
                for token in TOKENS:
                    allowed = await client.post("/v1/slates:batch", headers={"authorization": f"bearer {token}"}, content=b"{")
                    assert allowed.status_code == 422
                assert (await client.get("/healthz")).status_code == 200

    asyncio.run(story())


def test_the_loopback_interface_needs_no_token_and_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        assert settings(f"serving.host='{host}'") == []
    monkeypatch.setenv("TOKEN", "a-long-enough-token")
    for host in ("0.0.0.0", "10.1.2.3", "example.org", "::"):  # noqa: S104 - refused
        with pytest.raises(ConfigError, match="no token is configured"):
            settings(f"serving.host='{host}'")
        assert len(settings(f"serving.host='{host}'", "serving.tokens=[env:TOKEN]")) == 1


def test_a_short_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "short")
    with pytest.raises(ConfigError, match="less than 16 characters"):
        settings("serving.tokens=[env:TOKEN]")
