"""The trainer works a stream off, watches itself, and asks the gate before it releases anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from components.evaluation.gate import Decision
from components.retriever.bundle import Bundle, load_bundle
from infra import storage
from infra.errors import ServiceError, TrainingError
from infra.local import free_port
from infra.metrics import TRAINER, Meter
from serving.challenger import Challenger
from serving.trainer import StreamTrainer
from tests.streaming import append, event, settings, trainer, write_small_bundle

Start = Callable[..., StreamTrainer]


@pytest.fixture
def start(tmp_path: Path, valkey: str) -> Start:
    write_small_bundle(tmp_path, settings())

    def start(*overrides: str, **options: Any) -> StreamTrainer:
        return trainer(tmp_path, valkey, settings(*overrides), **options)

    return start


@pytest.fixture
def client(valkey: str) -> Iterator[Any]:
    with redis.Redis.from_url(valkey) as client:
        yield client


def pending(client: Any) -> int:
    return int(client.xpending("test:events", "trainer")["pending"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_it_trains_on_the_stream_and_acknowledges_what_is_committed(start: Start, valkey: str, client: Any, tmp_path: Path) -> None:
    append(valkey, [event(number) for number in range(40)])
    ours = start("streaming.checkpoint_every_s=3600")
    assert ours.run(max_events=35)
    assert ours.learner.steps == 3  # 16, 16 and 3
    assert pending(client) == 0
    assert ours._stream.lag().entries == 5
    manifest = storage.open_committed(str(tmp_path / "checkpoints" / names(tmp_path)[-1]))
    assert manifest.metadata["steps"] == 3
    again = start()
    assert again.learner.steps == 3
    assert again.run(until_idle=0)
    assert again.learner.steps == 4
    assert len(names(tmp_path)) == 3


def test_entries_are_not_acknowledged_before_a_checkpoint_holds_them(start: Start, valkey: str, client: Any) -> None:
    append(valkey, [event(number) for number in range(32)])
    ours = start("streaming.checkpoint_every_s=3600")

    def stop() -> None:
        raise KeyboardInterrupt

    ours.checkpoint = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ours.run(max_events=32)
    assert ours.learner.steps == 2
    assert pending(client) == 32


def test_a_step_is_made_of_what_is_there_after_a_while(start: Start, valkey: str) -> None:
    append(valkey, [event(number) for number in range(5)])
    ours = start("streaming.step_wait_s=0")
    assert ours.run(until_idle=0.01)
    assert ours.learner.steps == 1
    assert ours.run(until_idle=0)
    assert ours.learner.steps == 1


def test_its_metrics_tell_what_became_of_each_entry(start: Start, valkey: str, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def figure(name: str, **labels: str) -> float:
        value = meter.registry.get_sample_value(f"ray_rankgr_{name}", labels)
        assert value is not None, name
        return value

    append(valkey, [event(number) for number in range(40)] + [event(0)])
    client.xadd("test:events", {"event": b"\xff"})
    meter = Meter(TRAINER)
    ours = start("streaming.checkpoint_every_s=3600", meter=meter)
    ours.run(max_events=32)
    assert (figure("stream_entries_total"), figure("stream_pending"), figure("stream_lag_entries")) == (32, 0, 10)
    assert figure("stream_lag_seconds") > 0
    monkeypatch.setattr(ours.learner, "learn", lambda _rows: None)  # gradients that are not finite
    ours.run(until_idle=0.01)
    assert (figure("stream_entries_total"), figure("stream_trained_total"), figure("stream_lag_entries")) == (42, 32, 0)
    rejected = {reason: figure("stream_rejected_total", reason=reason) for reason in ("duplicate", "not JSON", "unknown item")}
    assert rejected == {"duplicate": 1, "not JSON": 1, "unknown item": 0}
    assert (figure("train_steps_total", outcome="done"), figure("train_steps_total", outcome="skipped")) == (2, 1)
    assert (figure("train_step_seconds_count"), figure("train_checkpoint_seconds_count")) == (3, 3)
    assert figure("train_loss") == ours.learner.loss
    assert 0 < figure("train_drift") < 1


def synced(
    start: Start, valkey: str, monkeypatch: pytest.MonkeyPatch, release: Any, *, passes: bool = True, **options: Any
) -> tuple[StreamTrainer, bool]:
    append(valkey, [event(number) for number in range(160)])
    monkeypatch.setattr(Challenger, "judge", lambda *_: Decision(passes, ("for a test",)))
    ours = start("streaming.sync_every_s=0", "streaming.gate_users=8", "decoding.exclude_seen=false", release=release, **options)
    return ours, ours.run(max_events=160)


def test_what_passes_the_gate_is_released_hour_after_hour(
    start: Start, valkey: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[dict[str, torch.Tensor]] = []

    def release(weights: Mapping[str, torch.Tensor], figures: object) -> Bundle:
        released.append(dict(weights))
        return load_bundle(str(tmp_path / "bundle"))

    meter = Meter(TRAINER)
    _, ended = synced(start, valkey, monkeypatch, release, meter=meter)
    assert ended
    assert len(released) > 1
    assert meter.registry.get_sample_value("ray_rankgr_release_seconds_count") == len(released)
    assert any(not torch.equal(released[0][name], released[-1][name]) for name in released[0])


def test_what_the_gate_refuses_is_not_released(start: Start, valkey: str, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(TRAINER)
    ours, ended = synced(start, valkey, monkeypatch, lambda *_: pytest.fail("released"), passes=False, meter=meter)
    assert ended
    assert ours.learner.steps == 10
    assert (meter.registry.get_sample_value("ray_rankgr_gate_decisions_total", {"decision": "refused"}) or 0) > 1
    assert meter.registry.get_sample_value("ray_rankgr_release_seconds_count") == 0


def test_a_registry_that_does_not_answer_stops_nothing(start: Start, valkey: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def release(*_: object) -> Bundle:
        raise ServiceError("MLflow cannot be reached")

    ours, ended = synced(start, valkey, monkeypatch, release)
    assert ended
    assert ours.learner.steps == 10


def test_it_ends_where_another_model_became_champion(start: Start, valkey: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours, ended = synced(start, valkey, monkeypatch, lambda *_: None)
    assert not ended
    assert ours.learner.steps < 10
    other = start(lineage="second")  # begins anew with the weights of its bundle, behind the last checkpoint's events
    assert other.learner.steps == 0
    assert other.run(max_events=16)
    manifest = storage.open_committed(str(tmp_path / "checkpoints" / names(tmp_path)[-1]))
    assert manifest.metadata["lineage"] == "second"


def test_a_step_that_goes_wrong_is_taken_back_and_its_events_are_left_out(
    start: Start, valkey: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(valkey, [event(number) for number in range(48)])
    ours = start("streaming.max_drift=0.9")
    ours.run(max_events=16)
    kept = ours.learner.averaged()
    learn = ours.learner.learn

    def explode(rows: Any) -> Any:
        losses = learn(rows)
        with torch.no_grad():
            for parameter in ours.learner.model.parameters():
                parameter += 10
        return losses

    with monkeypatch.context() as poisoned:
        poisoned.setattr(ours.learner, "learn", explode)
        ours.run(max_events=16)
    assert ours.rollbacks == 1
    assert all(torch.equal(kept[name], value) for name, value in ours.learner.averaged().items())
    assert start().rollbacks == 1  # committed, with the position behind the events that were left out
    ours.run(max_events=16)
    assert ours.learner.steps == 2


def test_a_loss_that_rises_is_taken_back_and_rollbacks_have_an_end(start: Start, valkey: str, monkeypatch: pytest.MonkeyPatch) -> None:
    append(valkey, [event(number) for number in range(96)])
    ours = start("streaming.max_rollbacks=2")
    ours.run(max_events=16)

    def rise(_rows: Any) -> None:
        ours.learner.loss = 1e6

    monkeypatch.setattr(ours.learner, "learn", rise)
    with pytest.raises(TrainingError, match="2 rollbacks in a row"):
        ours.run(max_events=80)
    assert ours.rollbacks == 3


def test_a_redis_that_is_gone_is_waited_for_and_then_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small_bundle(tmp_path, settings())
    monkeypatch.setattr("serving.trainer.time.sleep", lambda _: None)
    ours = trainer(tmp_path, f"redis://127.0.0.1:{free_port()}/0", settings("streaming.max_outage_s=0.1"))
    with pytest.raises(ServiceError, match="does not answer"):
        ours.run()
