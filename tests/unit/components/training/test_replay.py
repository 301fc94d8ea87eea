"""The replay buffer is a uniform sample of what came by, and goes on after a restart as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from components.retriever.packing import Row
from components.training.replay import ReplayBuffer


def row(number: int) -> Row:
    items, targets = np.arange(number % 4), np.full(1 + number % 2, number)
    return Row(items, items + 1, targets, targets * 0 + 3, targets * 0 + len(items), targets * 0)


def numbers(rows: list[Row]) -> list[int]:
    return [int(row.target_items[0]) for row in rows]


def test_it_keeps_all_rows_while_there_is_room_and_a_uniform_sample_after_that() -> None:
    counts = np.zeros(20)
    for seed in range(400):
        buffer = ReplayBuffer(5, seed)
        buffer.add(map(row, range(4)))
        assert sorted(numbers(buffer.sample(9, turn=0))) == [0, 1, 2, 3]
        buffer.add(map(row, range(4, 20)))
        assert len(buffer) == 5
        counts[numbers(buffer.sample(5, turn=0))] += 1
    # 400 draws with chance 1/4: mean 100, standard deviation 8.7.
    assert counts.min() > 60
    assert counts.max() < 140


def test_a_turn_draws_different_rows_and_another_turn_others() -> None:
    buffer = ReplayBuffer(50, 0)
    buffer.add(map(row, range(50)))
    first = numbers(buffer.sample(10, turn=1))
    assert len(set(first)) == 10
    assert first == numbers(buffer.sample(10, turn=1)) != numbers(buffer.sample(10, turn=2))


def test_a_restored_buffer_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    saved, restored = ReplayBuffer(6, 3), ReplayBuffer(6, 3)
    saved.add(map(row, range(11)))
    saved.save(tmp_path)
    restored.load(tmp_path)
    for buffer in (saved, restored):
        buffer.add(map(row, range(11, 30)))
    for mine, theirs in zip(saved.sample(6, turn=4), restored.sample(6, turn=4), strict=True):
        assert all(np.array_equal(getattr(mine, name), getattr(theirs, name)) for name in vars(mine))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_an_empty_buffer_and_one_without_room(tmp_path: Path) -> None:
    ReplayBuffer(5, 0).save(tmp_path)
    empty = ReplayBuffer(5, 0)
    empty.load(tmp_path)
    assert empty.sample(3, turn=0) == []
    none = ReplayBuffer(0, 0)
    none.add(map(row, range(9)))
    assert none.sample(3, turn=0) == []
