"""A training run without Ray, put together as the worker does."""

import math

import torch

from components.training.checkpoint import load_checkpoint, save_checkpoint
from components.training.data import plan_batches, training_rows
from components.training.loop import build_average, build_model, build_optimizer, first_state, run_epochs
from tests.unit.components.training.small import sids, timelines


class Trainer:
    """Everything that a run holds."""

    def __init__(self, config, early_stopping=None):
        self.config, self.rows, self.early = config, training_rows(timelines(), config), early_stopping
        self.model = build_model(config, sids())
        steps = plan_batches(self.rows, config).steps
        self.optimizer, self.schedule = build_optimizer(self.model, config, steps)
        self.average = build_average(self.model, config)
        self.state = first_state()

    def run(self, stops=math.inf, tell=None):
        """Train until the state was yielded some times, once an epoch as a rule, or to the end."""
        held = self.model, self.average, self.rows, self.optimizer, self.schedule, self.config, self.state
        for state in run_epochs(*held, tell=tell, early_stopping=self.early):
            self.state = state
            stops -= 1
            if not stops:
                break
        return self

    def save(self, folder):
        save_checkpoint(folder, self.model, self.average, self.optimizer, self.schedule, self.state, self.early)

    def load(self, folder):
        self.state = load_checkpoint(folder, self.model, self.average, self.optimizer, self.schedule, self.early)
        return self


def assert_same_weights(one, other):
    for mine, theirs in ((one.model, other.model), (one.average.module, other.average.module)):
        for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def losses(trainer):
    return [{name: value for name, value in point.items() if name != "seconds"} for point in trainer.state["curve"]]
