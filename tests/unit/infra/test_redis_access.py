"""Access rules of a real Valkey keep tenants apart; TLS is verified against the CA of the settings."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from infra.activity import UserActivity
from infra.errors import ServiceError
from infra.event_stream import AsyncEventWriter, Event, EventStream, Limits
from infra.redis_client import access_of
from infra.service_sections import SlateStoreConfig
from infra.slate_store import AsyncSlateReader, Slate, SlateStore

PASSWORDS = {"anna": "of-anna-0123456789", "bert": "of-bert-0123456789"}


@pytest.fixture
def tenants(valkey: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, SlateStoreConfig]]:
    """Two tenants whose users may touch nothing but the keys below their own prefix."""
    with redis.Redis.from_url(valkey) as admin:
        for name, password in PASSWORDS.items():
            admin.acl_setuser(name, enabled=True, passwords=[f"+{password}"], keys=[f"{name}:*"], categories=["+@all", "-@dangerous"])
            monkeypatch.setenv(f"USER_{name}", name)
            monkeypatch.setenv(f"PASSWORD_{name}", password)
        yield {n: SlateStoreConfig(prefix=n, username=f"env:USER_{n}", password=f"env:PASSWORD_{n}") for n in PASSWORDS}
        for name in PASSWORDS:
            admin.acl_deluser(name)


def slate(user: str) -> Slate:
    return Slate(user, ("a",), (1.0,), "v1", 1_700_000_000_000)


def test_a_tenant_publishes_and_reads_below_its_own_prefix_only(valkey: str, tenants: dict[str, SlateStoreConfig]) -> None:
    with SlateStore.of(tenants["anna"], valkey) as anna:
        anna.complete("v1", users=anna.publish("v1", [slate("u")]))
        anna.activate("v1")
        assert anna.get("u") == slate("u")
        assert anna.drop_old() == []
    # The settings of one with the prefix of the other: Valkey says no, not only our own key names.
    crossed = tenants["anna"].model_copy(update={"prefix": "bert"})
    with SlateStore.of(crossed, valkey) as store:
        with pytest.raises(ServiceError, match="forbids"):
            store.publish("v1", [slate("u")])
        with pytest.raises(ServiceError, match="forbids"):
            store.get("u")


def test_events_and_histories_of_a_tenant_lie_below_its_own_prefix_only(valkey: str, tenants: dict[str, SlateStoreConfig]) -> None:
    new = [Event("e", "u", "a", 2, 1_700_000_000_000)]

    async def write(config: SlateStoreConfig) -> None:
        async with (
            AsyncSlateReader.of(config, valkey) as reader,
            AsyncEventWriter(valkey, prefix=config.prefix, access=access_of(config, valkey)) as writer,
        ):
            for keep in (writer.append, UserActivity(reader).record):
                await keep(new)
            assert await UserActivity(reader).claim("v1", "u", 60)

    asyncio.run(write(tenants["anna"]))
    with EventStream(valkey, prefix="anna", access=access_of(tenants["anna"], valkey), limits=Limits(max_age_ms=None)) as stream:
        assert [event for _, event in stream.read(10)] == new
        stream.acknowledge(stream.position)
    with redis.Redis.from_url(valkey) as admin:
        keys = set(admin.scan_iter())
        assert len(keys) >= 4
        assert {key.partition(b":")[0] for key in keys} == {b"anna"}

    with pytest.raises(ServiceError, match="forbids"):
        asyncio.run(write(tenants["anna"].model_copy(update={"prefix": "bert"})))
    with (
        EventStream(valkey, prefix="anna", access=access_of(tenants["bert"], valkey)) as stream,
        pytest.raises(ServiceError, match="forbids"),
    ):
        stream.read(10)


def test_a_wrong_password_is_refused(valkey: str, tenants: dict[str, SlateStoreConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD_anna", "wrong")

    async def read() -> None:
        async with AsyncSlateReader.of(tenants["anna"], valkey) as reader:
            await reader.get("u")

    with pytest.raises(ServiceError, match="refused the password") as caught:
        asyncio.run(read())
    assert "wrong" not in str(caught.value)


def test_a_server_is_believed_only_with_a_certificate_of_the_ca(valkey: str, tmp_path: Path) -> None:
    own, other = certificate(tmp_path / "own"), certificate(tmp_path / "other")
    host, port = valkey.removeprefix("redis://").partition("/")[0].split(":")
    with tls_in_front_of(host, int(port), own) as tls_port:
        url = f"rediss://127.0.0.1:{tls_port}/0"
        with SlateStore.of(SlateStoreConfig(ca_file=str(own / "cert.pem")), url) as store:
            store.ping()
        with SlateStore(url, access={"ssl_ca_certs": str(other / "cert.pem")}) as store, pytest.raises(ServiceError):
            store.ping()

        async def read(folder: Path) -> str | None:
            async with AsyncSlateReader.of(SlateStoreConfig(ca_file=str(folder / "cert.pem")), url) as reader:
                return await reader.active_version()

        assert asyncio.run(read(own)) is None
        with pytest.raises(ServiceError):
            asyncio.run(read(other))


def certificate(folder: Path) -> Path:
    """A self-signed certificate for 127.0.0.1 in a folder."""
    folder.mkdir()
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    builder = x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key(), serial_number=1)
    builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    cert = builder.add_extension(addresses, critical=False).add_extension(x509.BasicConstraints(True, None), critical=True)
    pem, secret = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "cert.pem").write_bytes(cert.sign(key, hashes.SHA256()).public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, secret))
    return folder


class tls_in_front_of:  # noqa: N801 - reads as a verb
    """A TLS endpoint that passes bytes on to a port; its own thread for each direction of each connection."""

    def __init__(self, host: str, port: int, folder: Path) -> None:
        self.target = (host, port)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        self.server = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> int:
        threading.Thread(target=self._accept, daemon=True).start()
        return int(self.server.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self.server.close()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        try:
            with self.context.wrap_socket(plain, server_side=True) as client, socket.create_connection(self.target) as upstream:
                threading.Thread(target=_pump, args=(upstream, client), daemon=True).start()
                _pump(client, upstream)
        except OSError:
            pass  # a client that does not believe us hangs up


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while block := source.recv(65536):
            sink.sendall(block)
    except OSError:
        pass
