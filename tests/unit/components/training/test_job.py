"""What the training step hands to its workers, and how it waits for them."""

import os
import signal
import threading

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from components.training import job
from components.training.job import codebooks_of
from components.training.loop import build_model
from infra import storage
from tests.unit.components.training.small import configuration, sids


@pytest.fixture
def folder(tmp_path):
    """Of the step `semantic_ids`: 2 levels, 4 codewords, 3 features."""
    books = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    storage.write_bytes(str(tmp_path / "quantizer.safetensors"), save({"codebooks": books}))
    return str(tmp_path)


def test_codewords_start_from_the_codebooks_that_lie_beside_the_sids(folder):
    config = configuration("retriever.codeword_init=codebooks")
    model = build_model(config, sids(), codebooks_of(config, folder))
    # Only three features: what they do not span stays empty, and first codewords have norm 1/2 on average.
    first = model.codebook(0)
    assert torch.linalg.matrix_rank(first.detach()) == 3
    assert first.detach().norm(dim=1).mean().item() == pytest.approx(0.5, rel=1e-4)


def test_codewords_that_start_at_random_read_no_codebooks(tmp_path):
    assert codebooks_of(configuration(), str(tmp_path)) is None


class Controlled:
    """A trainer that runs until its controller is killed."""

    def __init__(self) -> None:
        self.killed = threading.Event()

    def fit(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        assert self.killed.wait(30)
        raise RuntimeError("the controller died")


def test_ctrl_c_waits_until_the_killed_controller_has_ended_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Controlled()
    monkeypatch.setattr(job, "kill_local_actors", lambda name: trainer.killed.set() if name == "TrainController" else None)
    with pytest.raises(KeyboardInterrupt):
        job._fit(trainer)
    assert trainer.killed.is_set()


def test_an_error_of_the_fit_is_raised_as_it_is() -> None:
    class Failing:
        def fit(self) -> None:
            raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        job._fit(Failing())
