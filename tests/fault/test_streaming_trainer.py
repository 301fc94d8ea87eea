"""A trainer that is killed at any instant goes on as if nothing had happened: its weights are those of an undisturbed run."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import redis
import torch
from safetensors.torch import load_file

from components.training.online import OnlineLearner
from infra import storage
from infra.event_stream import encode_event
from tests.streaming import append, event, settings, trainer, write_small_bundle

POISON, SHARE = 5, 40
EVENTS = POISON * SHARE
# Processes of their own, forked from one that has loaded torch already.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])
INSTANTS = [
    ("after a step", 3),
    ("before the commit", 3),
    ("a file of the checkpoint is half written", 13),
    ("after the commit", 4),
    ("while old checkpoints are dropped", 3),
    ("before the commit", 1),
]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dies(work: Callable[..., Any], *, at: int, before: bool) -> Callable[..., Any]:
    """The same function, which ends the process in its n-th call."""
    calls = 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and before:
            _die()
        result = work(*args, **options)
        if calls == at:
            _die()
        return result

    return wrapped


def _half_written(uri: str, data: bytes) -> None:
    Path(uri).parent.mkdir(parents=True, exist_ok=True)
    Path(uri).write_bytes(data[: len(data) // 2])


def work_off(folder: str, url: str, instant: str = "", at: int = 0) -> None:
    """What a process does; ends by SIGKILL where an instant is given."""
    torch.set_num_threads(1)
    if instant == "after a step":
        OnlineLearner.learn = _dies(OnlineLearner.learn, at=at, before=False)  # type: ignore[method-assign]
    elif instant in ("before the commit", "after the commit"):
        storage.commit = _dies(storage.commit, at=at, before=instant.startswith("before"))
    elif instant == "while old checkpoints are dropped":
        storage.remove = _dies(storage.remove, at=at, before=False)
    elif instant:
        write, torn = storage.write_bytes, _dies(_half_written, at=1, before=False)
        calls = iter(range(1, 1_000_000))
        storage.write_bytes = lambda uri, data: (torn if next(calls) == at else write)(uri, data)
    trainer(Path(folder), url, settings()).run(until_idle=0.3)


def run_process(folder: Path, url: str, *instant: Any, kill_after_s: float | None = None) -> int | None:
    process = PROCESSES.Process(target=work_off, args=(str(folder), url, *instant))
    process.start()
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join(180)
    return process.exitcode


def fill(url: str) -> None:
    """Events, some of them sent twice, and entries that no trainer can use."""
    changed = [replace(event(0), event_id="bad", item_id="nobody knows"), replace(event(0), event_id="bad", timestamp_ms=9 * 10**15)]
    poison = [b"\xff", b"x" * 20_000, b'{"event_id": "bad"}', *map(encode_event, changed)]
    with redis.Redis.from_url(url) as client:
        for number, content in enumerate(poison):
            append(url, [event(n) for n in range(number * SHARE, (number + 1) * SHARE)])
            client.xadd("test:events", {"event": content})
            append(url, [event((number + 1) * SHARE - 1)])


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").iterdir())[-1]


def assert_same_state(one: Path, other: Path) -> None:
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for path in one.glob("*.safetensors"):  # weights, average, optimizer, replay buffer, timelines
        theirs = load_file(other / path.name)
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6, msg=f"{path.name} {name}")
    for name in ("stream.json", "timelines.json", "state.json"):
        mine, theirs = (json.loads((folder / name).read_text()) for folder in (one, other))
        for state in (mine, theirs):
            if name == "stream.json":
                del state["synced_at"]  # a time of day
        assert mine == theirs


def test_a_trainer_killed_at_any_instant_ends_with_the_weights_of_an_undisturbed_one(valkey: str, tmp_path: Path) -> None:
    fill(valkey)
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    for folder in (killed, calm):
        write_small_bundle(folder, settings())
    for instant, at in INSTANTS:
        assert run_process(killed, valkey, instant, at) == -signal.SIGKILL, instant
    chance = random.Random(3)
    for _ in range(2):
        run_process(killed, valkey, kill_after_s=chance.uniform(0.2, 0.8))
    assert run_process(killed, valkey) == 0
    assert run_process(calm, valkey) == 0

    assert_same_state(newest(killed), newest(calm))
    stream = json.loads((newest(killed) / "stream.json").read_text())["stream"]
    assert stream["seen"] == EVENTS + 2 * POISON
    reasons = ("not JSON", "too large", "fields are missing or unknown", "unknown item", "from the future")
    assert stream["rejected"] == {"duplicate": POISON, **dict.fromkeys(reasons, 1)}
    with redis.Redis.from_url(valkey) as client:
        assert client.xpending("test:events", "trainer")["pending"] == 0
        assert client.xlen("test:quarantine") == POISON
