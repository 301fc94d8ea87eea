"""What tests share: one real Valkey and one local Ray for the whole session."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import redis

from infra.cluster import ray_session
from infra.local import no_process_left
from infra.local import valkey as run_valkey
from infra.service_sections import ClusterConfig
from tests.command import Finished, rankgr
from tests.logs import COLUMNS, write_log

# A shell that starts the tests in the background has Ctrl-C ignored, and what they start would ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)

ONCE = ("finished", "ray_cluster")
"""Fixtures that take long to make: their tests run in one of the processes of `make test`, which then makes them once."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in ONCE:
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(fixture))


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("loadgroup", default=False):
        apart = [item.nodeid for item in session.items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid]
        if apart:
            raise pytest.UsageError(
                f"groups are ignored, each process would make what {apart[0]} needs: pytest and pytest-xdist do not fit"
            )


@pytest.fixture(scope="session", autouse=True)
def _no_process_left() -> Iterator[None]:
    with no_process_left():
        yield


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_valkey(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@pytest.fixture
def valkey(valkey_server: str) -> Iterator[str]:
    """URL of a real Valkey, empty at the start of each test."""
    yield valkey_server
    with redis.Redis.from_url(valkey_server) as client:
        client.flushall()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Address of a local Ray cluster; this process is connected to it."""
    with ray_session(ClusterConfig(cpus=4)) as address:
        yield address


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One finished quickstart on a log of the user's own, for the tests of what it leaves behind."""
    folder = tmp_path_factory.mktemp("quickstart")
    events, items = write_log(folder, bad_rows=3)
    mapped = (*COLUMNS, "--set", "data.columns.item_id=sku")
    arguments = ("quickstart", "--logs", str(events), "--items", str(items), "--preset", "tiny", *mapped)
    return Finished(folder, arguments, rankgr(*arguments, folder=folder))
