"""Early stopping: HR@k of positives in the validation phase, decoded as the model will be served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.distributed import all_reduce

from components.retriever.contract import History, Ints
from components.retriever.model import Retriever
from components.retriever.recommender import RetrieverRecommender
from components.semantic_ids.table import codes_of
from components.semantic_ids.trie import build_trie
from infra import records as r
from infra.config import Config
from infra.errors import DataError


@dataclass(frozen=True)
class Case:
    """A user to be judged on.

    Attributes:
        history: events of the training phase.
        truth: distinct positives of the validation phase; without those of the history where these are never recommended.
    """

    history: History
    truth: Ints


def validation_cases(timelines: pa.Table, config: Config) -> list[Case]:
    """Users with a history and a truth, at most `validation_users` of them, the same for every run with the same seed."""
    cases = []
    for timeline in timelines.select(["items", "levels", "phases"]).to_pylist():
        items, levels, phases = (np.asarray(timeline[name], dtype=np.int64) for name in ("items", "levels", "phases"))
        past = (phases == r.Phase.TRAIN) & (levels >= config.retriever.history_min_level)
        truth = np.unique(items[(phases == r.Phase.VALID) & (levels >= config.split.positive_level)])
        if config.decoding.exclude_seen:
            truth = np.setdiff1d(truth, items[past])
        if past.any() and len(truth):
            cases.append(Case(History(items[past], levels[past]), truth))
    wanted = config.training.validation_users
    if wanted is not None and wanted < len(cases):
        chosen = np.random.default_rng(config.seed).choice(len(cases), wanted, replace=False)
        cases = [cases[index] for index in np.sort(chosen)]
    return cases


class EarlyStopping:
    """Keeps the weights with the best HR@k (RankGR Eq. 19) and says when nothing better has come for too long.

    Each worker decodes its part of the users; hits are added up over workers, so that all of them decide alike.

    Args:
        config: of the run.
        timelines: with a validation phase.
        sids: the SID table.
        rank: of this worker.
        world_size: workers.

    Raises:
        DataError: no user has a positive in the validation phase.
    """

    def __init__(self, config: Config, timelines: pa.Table, sids: pa.Table, *, rank: int = 0, world_size: int = 1) -> None:
        cases = validation_cases(timelines, config)
        if not cases:
            raise DataError(
                "no user has a new positive in the validation phase, so that nothing can be validated",
                where="training.patience",
                mend="set training.patience to null, or give more data",
            )
        popularity = np.zeros(len(sids), dtype=np.int64)
        popularity[sids[r.ITEM_INDEX].to_numpy()] = sids[r.POPULARITY].to_numpy()
        self._trie = build_trie(codes_of(sids), popularity, n_codes=config.semantic_ids.codes)
        self._config, self._cases, self._mine, self._several = config, len(cases), cases[rank::world_size], world_size > 1
        self.best_weights: dict[str, Tensor] | None = None
        self.best_rate, self.best_epoch, self._waited = -1.0, 0, 0

    @property
    def exhausted(self) -> bool:
        """Whether the patience is."""
        return self._config.training.patience is not None and self._waited >= self._config.training.patience

    def is_due(self, epoch: int) -> bool:
        """Whether to validate after this epoch; after the last one always."""
        return epoch % self._config.training.validate_every_epochs == 0 or epoch == self._config.training.epochs

    def judge(self, model: Retriever, epoch: int) -> dict[str, float]:
        """Measure HR@k of a model and keep its weights where they are the best so far.

        Args:
            model: averaged weights; left in evaluation mode.
            epoch: epochs finished.

        Returns:
            `hr@k`.
        """
        rate = self._hit_rate(model)
        if rate > self.best_rate:
            self.best_rate, self.best_epoch, self._waited = rate, epoch, 0
            self.best_weights = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
        else:
            self._waited += 1
        return {f"hr@{self._config.training.validation_k}": rate}

    def _hit_rate(self, model: Retriever) -> float:
        k, decoding = self._config.training.validation_k, self._config.decoding
        recommender = RetrieverRecommender(model, self._trie, decoding)
        ranked = recommender.recommend([case.history for case in self._mine], k, exclude_seen=decoding.exclude_seen) if self._mine else []
        hits = sum(np.isin(slate.items[:k], case.truth).sum() / len(case.truth) for slate, case in zip(ranked, self._mine, strict=True))
        total = torch.tensor(float(hits), dtype=torch.float64, device=model.sid_codes.device)
        if self._several:
            all_reduce(total)
        return float(total) / self._cases

    def state(self) -> dict[str, Any]:
        """JSON values, all but the weights."""
        return {"best_rate": self.best_rate, "best_epoch": self.best_epoch, "waited": self._waited}

    def restore(self, state: Mapping[str, Any], weights: dict[str, Tensor] | None) -> None:
        """Go on from an earlier `state` and its best weights."""
        self.best_rate, self.best_epoch, self._waited = state["best_rate"], state["best_epoch"], state["waited"]
        self.best_weights = weights
