"""Judge the retriever against tuned baselines (`python -m components.evaluation.job`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from components.evaluation.metrics import evaluate, invalid_rate
from components.evaluation.protocol import Cases, build_cases
from components.evaluation.tuning import tune_baselines
from components.semantic_ids.table import codes_of
from components.semantic_ids.trie import build_trie
from infra import records as r
from infra import storage
from infra.config import Config
from infra.steps import Run, StepResult, content_of, job_main, run_step

if TYPE_CHECKING:  # torch is imported where it is used: a finished step is skipped without it
    from components.retriever.recommender import RetrieverRecommender

STEP = "evaluation"
CODE = (
    "components/evaluation",
    "components/retriever",
    "components/semantic_ids/table.py",
    "components/semantic_ids/trie.py",
    "infra/records.py",
)
REPORT, EXAMPLES = "report.json", "examples.json"
_DIAGNOSED_USERS = 500


def evaluate_retriever(config: Config, sessions_uri: str, sids_uri: str, training_uri: str, out_uri: str) -> dict[str, Any]:
    """Judge retriever, popularity and item-kNN by the same protocol; write the report and examples below `out_uri`.

    Returns:
        the report: method -> metrics, `invalid_rate`, `users`, ...

    Raises:
        IntegrityError: weights that were trained on another SID table.
    """
    evaluation, min_level = config.evaluation, config.retriever.history_min_level
    exclude_seen, positive = config.decoding.exclude_seen, config.split.positive_level
    timelines = storage.read_table(storage.join(sessions_uri, "timelines"))
    catalogue = storage.read_table(storage.join(sessions_uri, "catalogue.parquet"))
    retriever = _load(config, catalogue, sids_uri, training_uri)
    popularity, item_knn = tune_baselines(
        timelines,
        len(catalogue),
        evaluation.truths,
        evaluation.ks,
        positive_level=positive,
        exclude_seen=exclude_seen,
        min_level=min_level,
        seed=config.seed,
    )
    cases = build_cases(
        timelines,
        r.Phase.TEST,
        evaluation.truths,
        exclude_seen=exclude_seen,
        min_level=min_level,
        max_users=evaluation.max_users,
        seed=config.seed,
    )
    methods = (retriever, item_knn.recommender, popularity.recommender)
    report: dict[str, Any] = {method.name: evaluate(method, cases, evaluation.ks) for method in methods}
    report |= {
        **_validity(retriever, cases),
        "users": len(cases),
        "items": len(catalogue),
        "cold_start_users": cases.cold_start_users,
        "params": {item_knn.recommender.name: item_knn.params, popularity.recommender.name: popularity.params},
        "catalogue": config.data.items or config.data.logs,
        "protocol": {**config.split.model_dump(), "truths": evaluation.truths, "exclude_seen": exclude_seen, "candidates": "all items"},
    }
    storage.write_json(storage.join(out_uri, REPORT), report)
    titles = catalogue[r.TITLE].to_pylist()
    storage.write_json(storage.join(out_uri, EXAMPLES), _examples(retriever, cases, titles, evaluation.examples))
    return report


def _load(config: Config, catalogue: pa.Table, sids_uri: str, training_uri: str) -> RetrieverRecommender:
    import torch
    from safetensors.torch import load

    from components.retriever.bundle import restore_model
    from components.retriever.recommender import RetrieverRecommender

    torch.set_num_threads(config.evaluation.threads)
    codes = codes_of(storage.read_table(storage.join(sids_uri, "sids.parquet")))
    weights = load(storage.read_bytes(storage.join(training_uri, "model.safetensors")))
    trie = build_trie(codes, catalogue[r.POPULARITY].to_numpy(), n_codes=config.semantic_ids.codes)
    return RetrieverRecommender(restore_model(config, codes, weights), trie, config.decoding)


def _validity(retriever: RetrieverRecommender, cases: Cases) -> dict[str, float | None]:
    """Share of generated SIDs without an item, as decoded and, as a diagnostic of training, without the trie."""
    from components.retriever.recommender import unconstrained_invalid_rate

    histories = cases.histories[:_DIAGNOSED_USERS]
    if not histories:
        return {"invalid_rate": None, "unconstrained_invalid_rate": None}
    table = retriever.model.sid_codes.cpu().numpy()
    return {
        "invalid_rate": invalid_rate(retriever.generate(histories), table),
        "unconstrained_invalid_rate": unconstrained_invalid_rate(retriever.model, histories),
    }


def _examples(retriever: RetrieverRecommender, cases: Cases, titles: Sequence[str], count: int) -> list[dict[str, Any]]:
    histories, truths = cases.histories[:count], next(iter(cases.truths.values()))[:count]
    slates = retriever.recommend(histories, 10, exclude_seen=cases.exclude_seen)
    return [
        {
            "user_id": user,
            "history": [titles[i] for i in history.items[-10:]],
            "slate": [{"title": titles[i], "score": float(score)} for i, score in zip(slate.items, slate.scores, strict=True)],
            "truth": [titles[i] for i in truth],
        }
        for user, history, slate, truth in zip(cases.user_ids[:count], histories, slates, truths, strict=True)
    ]


def step(run: Run, sessions: str, semantic_ids: str, training: str) -> StepResult:
    """The step `evaluation`: weights to the report."""
    config = run.config
    parts = ("evaluation", "decoding", "split", "retriever")
    return run_step(
        run,
        STEP,
        lambda out_uri: evaluate_retriever(config, sessions, semantic_ids, training, out_uri),
        settings={name: getattr(config, name).model_dump() for name in parts} | {"seed": config.seed},
        inputs={"sessions": content_of(sessions), "semantic_ids": content_of(semantic_ids), "training": content_of(training)},
        code=CODE,
    )


if __name__ == "__main__":
    job_main(step, ("sessions", "semantic_ids", "training"))
