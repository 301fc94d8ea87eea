"""A bulk run that is killed halfway goes on with what is missing; until it is done, readers see the version they had."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from components.precompute.job import precompute
from infra.cluster import connect
from infra.config import Config, load_config
from infra.slate_store import SlateStore
from tests.command import ROOT
from tests.fakes import fake_loader, write_bundle, write_timelines

USERS, PART, PARTS = 96, 8, 12
PROGRAM = "import json, sys; from tests.fault.test_killed_precompute import publish; publish(*json.loads(sys.argv[1]))"


def counting_loader(version: str, url: str, key: str, hold_after: int = 0) -> Callable[[str], Any]:
    """A model that counts in Redis for how many users it computes, and after so many waits for ever."""
    inner = fake_loader(version)

    def load(uri: str) -> Any:
        import time

        import redis

        bundle = inner(uri)
        recommender, client = bundle.recommender(), redis.Redis.from_url(url)

        class Counting:
            def recommend(self, histories: Any, k: int, *, exclude_seen: bool) -> Any:
                while hold_after and int(client.get(key) or 0) >= hold_after:
                    time.sleep(0.05)
                client.incrby(key, len(histories))
                return recommender.recommend(histories, k, exclude_seen=exclude_seen)

        bundle.recommender = Counting
        return bundle

    return load


def settings() -> Config:
    return load_config(overrides=["decoding.slate_size=5", "decoding.users_per_batch=2", "serving.precompute_actors=1"])


def publish(address: str, folder: str, url: str, version: str, hold_after: int) -> dict[str, Any]:
    """What a process does; `hold_after` leaves it waiting in the middle."""
    config = settings()
    connect(config.cluster.model_copy(update={"address": address}))
    return precompute(
        config, f"{folder}/bundle", f"{folder}/timelines", url, version, loader=counting_loader(version, url, "first", hold_after)
    )


def killed_after(url: str, version: str, parts: int, *arguments: Any) -> dict[str, int]:
    """Start a process, kill it once so many parts are marked; returns users of the parts that are."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, json.dumps(arguments)], cwd=ROOT)
    deadline = time.monotonic() + 120
    with SlateStore(url) as store, redis.Redis.from_url(url) as client:
        while client.hlen(store.keys.parts(version)) < parts:
            assert process.poll() is None and time.monotonic() < deadline, "the run did not get that far"
            time.sleep(0.02)
        process.kill()
        process.wait(30)
        return {name.decode(): int(users) for name, users in client.hgetall(store.keys.parts(version)).items()}


def test_a_killed_run_goes_on_with_the_parts_that_are_missing(
    ray_cluster: str, valkey: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bundle(tmp_path / "bundle")
    write_timelines(tmp_path / "timelines", USERS)
    before = precompute(settings(), f"{tmp_path}/bundle", f"{tmp_path}/timelines", valkey, "v1", loader=fake_loader("v1"))
    assert (before["users"], before["users_of_earlier_attempts"]) == (USERS, 0)

    done = killed_after(valkey, "v2", 5, ray_cluster, str(tmp_path), valkey, "v2", 5 * PART + 2)
    already = sum(done.values())
    assert 0 < len(done) < PARTS
    assert set(done.values()) == {PART}
    with SlateStore(valkey) as store, redis.Redis.from_url(valkey) as client:
        assert store.active_version() == "v1"
        assert {slate.model_version for slate in store.get_many([f"user-{u}" for u in range(USERS)]).values()} == {"v1"}
        capsys.readouterr()

        loader = counting_loader("v2", valkey, "second")
        result = precompute(settings(), f"{tmp_path}/bundle", f"{tmp_path}/timelines", valkey, "v2", loader=loader)
        assert (result["users"], result["users_of_earlier_attempts"]) == (USERS, already)
        assert int(client.get("second")) == USERS - already
        assert (store.active_version(), store.users("v2"), store.count("v2")) == ("v2", USERS, USERS)
        assert f"{USERS}/{USERS} users" in capsys.readouterr().err

        loader = counting_loader("v2", valkey, "third")  # a version that is complete is published anew
        again = precompute(settings(), f"{tmp_path}/bundle", f"{tmp_path}/timelines", valkey, "v2", loader=loader)
        assert (again["users_of_earlier_attempts"], int(client.get("third"))) == (0, USERS)


@pytest.mark.usefixtures("ray_cluster")
def test_what_another_job_published_is_not_taken_for_done(valkey: str, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    write_timelines(tmp_path / "timelines", USERS)
    with SlateStore(valkey) as store:
        store.mark_part("v1", "of other settings", "part-00000.parquet:0", PART)
        assert store.parts("v1", "of other settings") == {"part-00000.parquet:0": PART}
        result = precompute(settings(), f"{tmp_path}/bundle", f"{tmp_path}/timelines", valkey, "v1", loader=fake_loader("v1"))
    assert (result["users"], result["users_of_earlier_attempts"]) == (USERS, 0)
