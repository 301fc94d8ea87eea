"""Quality on public data: the retriever and its ablations against popularity, item-kNN and SASRec.

`python -m tests.benchmarks.quality --data beauty|kuairand|kuairand_histories [--variant rankgr ...] [--seeds 0,1,2] [--device cpu|cuda]
[--quick]` runs the product's own steps, judges every user on the whole catalogue, prints a table and writes
`tests/benchmarks/results/<data>.md` with its plots. Steps that are finished are skipped and killed ones go on from their
last checkpoint, so a run may be stopped and repeated at will. The last line printed is JSON.

Variants (RankGR, Table 4): `rankgr` has both phases as the preset sets them, `no_iap` no listwise preferences (alpha 0),
`no_rsp` no rank head (ranked by log p alone), `ntp` neither: the plain generative retriever. `ntp_clicks` is that one with
exposures at 0.1, the best weights found for clicks without a rank head.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from safetensors.torch import load

from components.evaluation.metrics import evaluate
from components.evaluation.protocol import Cases, build_cases
from components.evaluation.tuning import tune_baselines
from components.retriever.bundle import restore_model
from components.retriever.contract import Recommender
from components.retriever.recommender import RetrieverRecommender
from components.semantic_ids.job import step as semantic_ids_step
from components.semantic_ids.table import codes_of
from components.semantic_ids.trie import build_trie
from components.sessions.job import step as sessions_step
from components.training.data import first_target_ms
from components.training.job import step as training_step
from infra import records as r
from infra import storage
from infra.cluster import ray_session
from infra.config import Config, load_config
from infra.errors import ConfigError
from infra.logs import configure_logs
from infra.steps import Run, content_of, run_step
from tests.benchmarks.amazon import write_beauty
from tests.benchmarks.data import data_folder
from tests.benchmarks.kuairand import write_kuairand_histories
from tests.benchmarks.quality_report import Results, told, write_report
from tests.benchmarks.sasrec import SASRecSettings, fit_sasrec

Figures = dict[str, float]
NO_IAP: Final = ("training.loss.alpha=0",)
NO_RSP: Final = ("training.loss.rsp_weight=0", "decoding.score=iap")
FEW_EXPOSURES: Final = ("training.loss.ntp_level_weights={1: 0.0, 2: 0.1, 3: 1.0, 4: 1.0}",)
VARIANTS: Final = {
    "rankgr": (),
    "no_iap": NO_IAP,
    "no_rsp": NO_RSP,
    "ntp": (*NO_IAP, *NO_RSP),
    "ntp_clicks": (*NO_IAP, *NO_RSP, *FEW_EXPOSURES),
}
ALPHAS: Final = (0.0, 0.1, 0.3, 1.0, 3.0)
LAST_LAMBDAS: Final = (4, 8, 16, 32, 64, 128)
QUICK: Final = ("training.epochs=1", "evaluation.max_users=500")
_CODE: Final = ("components", "infra/records.py", "tests/benchmarks/quality.py", "tests/benchmarks/sasrec.py")


@dataclass(frozen=True)
class Task:
    """A data set and how methods are judged on it.

    Attributes:
        preset: whose settings hold.
        overrides: what is set otherwise.
        log_of: writes or finds the events and the items, given a folder.
        variants: those that differ on this data.
        exclude_seen: each setting is judged; the first one is the headline.
        sasrec: settings found on the validation phase; those of `kuairand_histories` are of `kuairand`, not searched again.
    """

    name: str
    preset: str
    overrides: tuple[str, ...]
    log_of: Callable[[Path], tuple[Path, Path]]
    variants: tuple[str, ...]
    exclude_seen: tuple[bool, ...]
    sasrec: SASRecSettings


def _kuairand(_: Path) -> tuple[Path, Path]:
    folder = data_folder("kuairand_pure_14d")
    return folder / "interactions.parquet", folder / "items.parquet"


BEAUTY: Final = Task(
    name="beauty",
    preset="beauty",
    overrides=(),
    log_of=write_beauty,
    variants=("ntp", "rankgr"),  # one level of feedback: there are no lower levels to prefer a purchase to, so LDPO has nothing to do
    exclude_seen=(False, True),
    sasrec=SASRecSettings(rows_per_batch=64, learning_rate=1e-3, epochs=60),
)
KUAIRAND: Final = Task(
    name="kuairand",
    preset="kuairand",
    overrides=(),
    log_of=_kuairand,
    variants=("ntp_clicks", "ntp", "rankgr", "no_rsp", "no_iap"),
    exclude_seen=(False,),
    sasrec=SASRecSettings(rows_per_batch=64, learning_rate=1e-3, epochs=8, max_history=64),
)
# What was liked weeks ago says what a user likes, and little of what is shown today: it is history and no target.
KUAIRAND_HISTORIES: Final = replace(
    KUAIRAND,
    name="kuairand_histories",
    overrides=("training.target_days=11", "training.tokens_per_batch=1024", "training.epochs=4"),
    log_of=write_kuairand_histories,
)
TASKS: Final = {task.name: task for task in (BEAUTY, KUAIRAND, KUAIRAND_HISTORIES)}


class Bench:
    """The runs of one task in one workspace, judged on these phases, networks on this device."""

    def __init__(
        self,
        task: Task,
        workspace: Path,
        *,
        quick: bool,
        phases: Sequence[r.Phase] = (r.Phase.VALID, r.Phase.TEST),
        device: str = "cpu",
    ) -> None:
        self.task, self.quick, self.workspace, self.phases, self.device = task, quick, workspace, phases, device
        self.files = task.log_of(workspace / "log")
        self.sessions = sessions_step(self.run((), seed=0)).uri
        self.timelines = storage.read_table(storage.join(self.sessions, "timelines"))
        self.catalogue = storage.read_table(storage.join(self.sessions, "catalogue.parquet"))

    def config(self, overrides: Sequence[str], *, seed: int) -> Config:
        """The preset with the task's files and some settings changed."""
        logs, items = self.files
        places = (f"workspace={self.workspace}", f"data.logs={logs}", f"data.items={items}", f"seed={seed}")
        places = (*places, f"training.use_gpu={'true' if self.device == 'cuda' else 'false'}")
        overrides = (*places, *self.task.overrides, *(QUICK if self.quick else ()), *overrides)
        config = load_config(preset=self.task.preset, overrides=overrides)
        if config.decoding.score != "iap":
            return config
        # Without a rank head there is nothing that codewords are retained for.
        every = [config.semantic_ids.codes] * config.semantic_ids.levels
        return load_config(preset=self.task.preset, overrides=(*overrides, f"decoding.lambdas={every}"))

    def run(self, overrides: Sequence[str], *, seed: int) -> Run:
        """A walk through the steps with such a configuration."""
        return Run(self.config(overrides, seed=seed), run_id="quality")

    def cases(self, config: Config, phase: r.Phase, *, exclude_seen: bool) -> Cases:
        """Whom methods are judged on, the same for all of them."""
        evaluation = config.evaluation
        return build_cases(
            self.timelines,
            phase,
            evaluation.truths,
            exclude_seen=exclude_seen,
            min_level=config.retriever.history_min_level,
            max_users=evaluation.max_users,
        )

    def measure(self, method: Recommender, config: Config) -> dict[str, Figures]:
        """Figures of the validation and the test phase, for each treatment of seen items."""
        figures = {}
        for exclude_seen in self.task.exclude_seen:
            for phase in self.phases:
                cases = self.cases(config, phase, exclude_seen=exclude_seen)
                figures[setting_name(phase, exclude_seen=exclude_seen)] = evaluate(method, cases, config.evaluation.ks)
        return figures

    def baselines(self) -> dict[str, dict[str, Figures]]:
        """Popularity and item-kNN, tuned on the validation phase."""
        run = self.run((), seed=0)

        def work(out_uri: str) -> dict[str, Any]:
            found = {}
            for method in self._tuned(run.config):
                found[method.recommender.name] = {"params": method.params, "figures": self.measure(method.recommender, run.config)}
            storage.write_json(storage.join(out_uri, "figures.json"), found)
            return {}

        found = self._judged(run, "quality_baselines", work, {}, {})
        return {name: entry["figures"] for name, entry in found.items()}

    def _tuned(self, config: Config) -> tuple[Any, ...]:
        return tune_baselines(
            self.timelines,
            len(self.catalogue),
            config.evaluation.truths,
            config.evaluation.ks,
            positive_level=config.split.positive_level,
            exclude_seen=self.task.exclude_seen[0],
            min_level=config.retriever.history_min_level,
        )

    def sasrec(self, seed: int) -> dict[str, Figures]:
        """SASRec of one seed."""
        run, settings = self.run((), seed=seed), self.task.sasrec
        settings = SASRecSettings(**{**asdict(settings), "epochs": 1}) if self.quick else settings

        def work(out_uri: str) -> dict[str, Any]:
            sequences, firsts = train_sequences(self.timelines, settings.min_level, run.config.training.target_days)
            method = fit_sasrec(sequences, len(self.catalogue), settings, seed=seed, first_targets=firsts, device=self.device)
            storage.write_json(storage.join(out_uri, "figures.json"), self.measure(method, run.config))
            return {}

        work_settings = {"sasrec": asdict(settings), "seed": seed, "days": run.config.training.target_days, "device": self.device}
        return self._judged(run, "quality_sasrec", work, work_settings, {})

    def retriever(self, overrides: Sequence[str], *, seed: int, lambdas: Sequence[int] = ()) -> dict[str, Any]:
        """Train and judge a variant of the retriever; with `lambdas`, one figure for each number of codewords retained."""
        run = self.run(overrides, seed=seed)
        sids = semantic_ids_step(run, self.sessions).uri
        weights = training_step(run, self.sessions, sids).uri

        def work(out_uri: str) -> dict[str, Any]:
            storage.write_json(storage.join(out_uri, "figures.json"), self._measure_retriever(run.config, sids, weights, lambdas))
            return {}

        settings = {"decoding": run.config.decoding.model_dump(), "lambdas": list(lambdas)}
        return self._judged(run, "quality", work, settings, {"semantic_ids": content_of(sids), "training": content_of(weights)})

    def _measure_retriever(self, config: Config, sids: str, weights: str, lambdas: Sequence[int]) -> dict[str, Any]:
        method = load_retriever(config, self.catalogue, sids, weights, device=self.device)
        if not lambdas:
            return self.measure(method, config)
        cases = self.cases(config, r.Phase.TEST, exclude_seen=self.task.exclude_seen[0])
        swept = {}
        for last in lambdas:
            kept = [*config.decoding.lambdas[:-1], last]
            method.decoding = config.decoding.model_copy(update={"lambdas": kept})
            swept[str(last)] = evaluate(method, cases, config.evaluation.ks)
        return swept

    def _judged(self, run: Run, name: str, work: Any, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any]:
        evaluation = {"evaluation": run.config.evaluation.model_dump(), "exclude_seen": self.task.exclude_seen, "phases": self.phases}
        inputs = {"sessions": content_of(self.sessions), **inputs}
        result = run_step(run, name, work, settings={**evaluation, **settings}, inputs=inputs, code=_CODE)
        return dict(storage.read_json(storage.join(result.uri, "figures.json")))


def load_retriever(config: Config, catalogue: pa.Table, sids: str, weights: str, *, device: str = "cpu") -> RetrieverRecommender:
    """The trained retriever, decoding as configured."""
    codes = codes_of(storage.read_table(storage.join(sids, "sids.parquet")))
    state = load(storage.read_bytes(storage.join(weights, "model.safetensors")))
    trie = build_trie(codes, catalogue[r.POPULARITY].to_numpy(), n_codes=config.semantic_ids.codes)
    return RetrieverRecommender(restore_model(config, codes, state).to(device), trie, config.decoding)


def train_sequences(timelines: pa.Table, min_level: int, target_days: float | None) -> tuple[list[np.ndarray], list[int]]:
    """Each user's items of the training phase with at least this level, in time order, and where its targets begin."""
    start = first_target_ms(timelines, target_days)
    sequences, firsts = [], []
    columns = timelines.select(["items", "levels", "phases", "timestamps"]).to_pydict()
    for items, levels, phases, times in zip(*columns.values(), strict=True):
        kept = (np.asarray(phases) == r.Phase.TRAIN) & (np.asarray(levels) >= min_level)
        if kept.any():
            sequences.append(np.asarray(items, dtype=np.int64)[kept])
            firsts.append(int(np.searchsorted(np.asarray(times)[kept], start)))
    return sequences, firsts


def setting_name(phase: r.Phase, *, exclude_seen: bool) -> str:
    """Key of the figures of a phase and a treatment of seen items."""
    return f"{phase.name.lower()}, seen items {'excluded' if exclude_seen else 'kept'}"


def measure_all(bench: Bench, variants: Mapping[str, Sequence[int]], seeds: Sequence[int], *, sweeps: bool) -> Results:
    """Every method and seed, one after the other.

    Args:
        bench: of the task.
        variants: of the retriever, with the seeds of each.
        seeds: of SASRec.
        sweeps: over lambda and alpha too, with the first seed of `rankgr`.
    """
    methods = {name: [figures] for name, figures in bench.baselines().items()}
    for variant, own in variants.items():
        methods[variant] = [bench.retriever(VARIANTS[variant], seed=seed) for seed in own]
    methods["sasrec"] = [bench.sasrec(seed) for seed in seeds]
    found: dict[str, dict[str, Figures]] = {}
    if sweeps and "rankgr" in variants:
        seed = variants["rankgr"][0]
        config = bench.config((), seed=seed)
        # With fewer candidates than are asked for, the decoder widens until there are enough: no figure of such a lambda.
        fewest = max(config.evaluation.ks) / config.decoding.beams[-2]
        most = config.training.loss.train_lambdas[-1]
        found["lambda"] = bench.retriever((), seed=seed, lambdas=[n for n in LAST_LAMBDAS if fewest <= n <= most])
    if sweeps and "no_iap" in variants:
        headline = setting_name(r.Phase.TEST, exclude_seen=bench.task.exclude_seen[0])
        seed = variants["no_iap"][0]
        runs = {alpha: bench.retriever((f"training.loss.alpha={alpha}", *NO_RSP), seed=seed) for alpha in ALPHAS}
        found["alpha"] = {str(alpha): figures[headline] for alpha, figures in runs.items()}
    return Results(methods, found)


def parse_variants(texts: Sequence[str], seeds: Sequence[int]) -> dict[str, list[int]]:
    """`name` with the seeds of all, or `name:0,1` with its own.

    Raises:
        ConfigError: a variant that does not exist.
    """
    found = {}
    for text in texts:
        name, _, own = text.partition(":")
        if name not in VARIANTS:
            raise ConfigError(f"unknown variant {name!r}", mend=f"choose among {', '.join(VARIANTS)}")
        found[name] = [int(seed) for seed in own.split(",")] if own else list(seeds)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, choices=list(TASKS))
    parser.add_argument(
        "--variant", nargs="*", help="those to run, by default all that differ on the data; rankgr:0,1 has seeds of its own"
    )
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where networks are trained and judged")
    parser.add_argument("--quick", action="store_true", help="one epoch, one seed, 500 users: does everything run? Figures mean nothing")
    parser.add_argument("--no-sweeps", action="store_true", help="leave lambda and alpha alone")
    parser.add_argument("--workspace", type=Path, help="where runs and checkpoints lie (.rankgr/quality/<data>)")
    options = parser.parse_args(arguments)
    task = TASKS[options.data]
    seeds = [0] if options.quick else [int(seed) for seed in options.seeds.split(",")]
    variants = parse_variants(options.variant or task.variants, seeds)
    workspace = (options.workspace or Path(".rankgr") / "quality" / f"{task.name}{'-quick' if options.quick else ''}").resolve()
    configure_logs()
    with ExitStack() as stack:
        stack.enter_context(ray_session(load_config(preset=task.preset).cluster))
        bench = Bench(task, workspace, quick=options.quick, device=options.device)
        results = measure_all(bench, variants, seeds, sweeps=not options.no_sweeps)
    command = f"python -m tests.benchmarks.quality {told(arguments or sys.argv[1:])}"
    config = bench.config((), seed=seeds[0])
    summary = write_report(results, task.name, command, config, folder=workspace if options.quick else None)
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
