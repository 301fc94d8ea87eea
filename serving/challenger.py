"""Weights that were set aside, and the users seen since: events that neither they nor the served weights were trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from components.evaluation.gate import Decision, decide_update
from components.evaluation.metrics import evaluate
from components.evaluation.protocol import Cases
from components.retriever.bundle import Bundle, restore_model
from components.retriever.recommender import RetrieverRecommender
from components.semantic_ids.table import codes_of
from infra.config import Config
from infra.errors import IntegrityError
from serving.timelines import Visit


class Challenger:
    """Judges weights against the served ones on what came after them (progressive validation).

    Args:
        weights: of a committed checkpoint.
        config: `evaluation`, `decoding`, `gate` and `streaming.gate_users` are used.

    Attributes:
        figures: of the new and the served weights, once they are judged.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: Config) -> None:
        self.weights, self._config = dict(weights), config
        self._visits: list[tuple[Visit, dict[str, np.ndarray]]] = []
        self.figures: dict[str, dict[str, float]] = {}

    @property
    def is_due(self) -> bool:
        """Whether enough users came by."""
        return len(self._visits) >= self._config.streaming.gate_users

    def watch(self, visits: Iterable[Visit]) -> None:
        """Take what users did before anything is trained on it; users without a history or a truth are not judged."""
        for visit in visits:
            truths = self._truths(visit)
            if len(visit.history.items) and any(map(len, truths.values())):
                self._visits.append((visit, truths))

    def _truths(self, visit: Visit) -> dict[str, np.ndarray]:
        items, levels = np.array(visit.items, np.int64), np.array(visit.levels)
        found = {name: np.unique(items[levels >= level]) for name, level in self._config.evaluation.truths.items()}
        if not self._config.decoding.exclude_seen:
            return found
        return {name: np.setdiff1d(truth, visit.history.items) for name, truth in found.items()}

    def judge(self, served: Bundle) -> Decision:
        """The gate's decision; what cannot be compared is refused."""
        config = self._config
        cases = Cases(
            user_ids=[visit.user_id for visit, _ in self._visits],
            histories=[visit.history for visit, _ in self._visits],
            truths={name: [truths[name] for _, truths in self._visits] for name in config.evaluation.truths},
            exclude_seen=config.decoding.exclude_seen,
            cold_start_users=0,
        )
        try:
            own = restore_model(served.config, codes_of(served.sids), self.weights)
        except IntegrityError as error:
            return Decision(False, (error.what,))
        methods = {"new": RetrieverRecommender(own, served.trie, config.decoding), "served": served.recommender()}
        self.figures = {name: evaluate(method, cases, config.evaluation.ks) for name, method in methods.items()}
        return decide_update(self.figures["new"], self.figures["served"], len(cases), config.gate)
