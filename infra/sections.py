"""The sections of the configuration: a frozen pydantic model per stage, each setting with its range and meaning.

Those of what surrounds data and model are in `infra.service_sections`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

FeedbackLevel = Annotated[int, Field(ge=1, le=4)]


class Section(BaseModel):
    """Base of every sub-model: frozen, unknown keys refused, documented fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Columns(Section):
    """Names of the user's own columns; null where a column does not exist."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str = "timestamp"
    level: str | None = "level"
    """Column with the feedback level 1..4; ignored where `level_rules` is set."""
    request_id: str | None = None
    """Column with the request or session id; null cuts requests by `request_gap_minutes`."""
    segment: str | None = None
    """Column of the log with what the user belongs to, such as a region: who has no slate yet is shown what is popular there."""
    signals: dict[str, str] = {}
    """Name -> column of the log with a number or a flag that says more than the level does, such as `watch_ms: play_time_ms`: what
    the reward model learns to foresee."""
    title: str | None = "title"
    text: list[str] = ["title", "category", "brand"]
    """Item columns joined into the text that is encoded; those that do not exist are left out."""
    category: str | None = "category"
    brand: str | None = "brand"
    embedding: str | None = "embedding"


class DataConfig(Section):
    """Raw logs and items, and how they become timelines."""

    logs: str = ""
    """URI of the events: a Parquet, CSV or JSONL file or folder (local path or s3://)."""
    items: str = ""
    """URI of the catalogue; empty: items are known by their ids alone."""
    columns: Columns = Columns()
    level_rules: dict[FeedbackLevel, list[str]] = {}
    """Level -> columns of which one being truthy gives that level, highest first; no rule holds: `default_level`."""
    default_level: int = Field(2, ge=1, le=4)
    timestamp_unit: Literal["ms", "s", "us"] = "ms"
    request_gap_minutes: float = Field(30.0, gt=0)
    max_request_items: int = Field(8, ge=1)
    """A longer request is cut into pages of this many items; each page is predicted from all that lies before it."""
    max_bad_fraction: float = Field(0.05, ge=0, le=1)
    """More bad rows than this stop the run; fewer are quarantined with their reasons."""
    shards: int = Field(4, ge=1)
    """Timeline files, by hash of the user; a shard fits in one worker's memory: 500,000 events in 0.6 GB, 2 million in 1.2. How many for
    a log says `rankgr plan --events`."""


class SplitConfig(Section):
    """Evaluation protocol, written into the timelines as phases."""

    protocol: Literal["leave_one_out", "temporal"] = "leave_one_out"
    positive_level: int = Field(3, ge=1, le=4)
    """Events of this level and above are positives: targets of leave-one-out, popularity counts, label 1 of the rank head."""
    test_days: int = Field(2, ge=1)
    valid_days: int = Field(1, ge=1)
    utc_offset_hours: float = Field(0.0, ge=-12, le=14)
    """Where a day begins, for the temporal protocol."""


class RqVaeConfig(Section):
    """The quantizer `rq_vae`: an autoencoder whose latent vectors are quantized residually."""

    latent_dim: int = Field(32, ge=2)
    hidden_dims: list[Annotated[int, Field(ge=2)]] = [256, 128]
    """Widths of the encoder's layers; the decoder mirrors them."""
    epochs: int = Field(60, ge=1)
    batch: int = Field(1024, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    commitment: float = Field(0.25, ge=0)
    """Weight of the pull of the encoder towards the codewords."""
    codebook: Literal["ema", "gradient"] = "ema"
    """How codewords learn: moving averages of what they encode, or the gradient of the codebook loss."""
    ema_decay: float = Field(0.95, ge=0, lt=1)
    sinkhorn: bool = False
    """Spread the last level's codes evenly over each batch while training (optimal transport, as LC-Rec does)."""


class AdapterConfig(Section):
    """The collaborative signal `adapter`: a network from features to a space where items of one session lie close."""

    hidden_dim: int = Field(256, ge=2)
    epochs: int = Field(10, ge=1)
    """Each draws four pairs an item."""
    batch: int = Field(512, ge=2)
    learning_rate: float = Field(3e-3, gt=0)
    temperature: float = Field(0.1, gt=0)
    signal_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of items whose co-occurrences are hidden in a batch, so that the network does not rest on them alone. More of it moves
    weight from co-occurrences to content."""


class SemanticIdConfig(Section):
    """Item features and their quantization (RankGR Eq. 1, GenRec Eq. 1, OneRec Algorithm 1)."""

    quantizer: Literal["rq_kmeans", "balanced_rq_kmeans", "rq_vae"] = "balanced_rq_kmeans"
    """`balanced_rq_kmeans`: codewords of a level have the same number of items, give or take one, before collisions are resolved."""
    levels: int = Field(2, ge=1, le=4)
    codes: int = Field(64, ge=2, le=8192)
    """Codewords a level."""
    collisions: Literal["shared", "unique"] = "unique"
    max_items_per_sid: int = Field(5, ge=1)
    """Capacity of a SID in shared mode."""
    iterations: int = Field(25, ge=1)
    """Passes of k-means a level."""
    text_encoder: str = "tfidf"
    """`tfidf` (TF-IDF + SVD, embedded) or the name, folder or s3:// URI of a sentence-transformers model."""
    text_dim: int = Field(64, ge=2)
    collaborative_dim: int = Field(64, ge=2)
    text_weight: float = Field(0.3, ge=0)
    embedding_weight: float = Field(1.0, ge=0)
    collaborative_weight: float = Field(1.0, ge=0)
    collaborative: Literal["pmi", "cosine", "adapter"] = "pmi"
    """`pmi`: SVD of pointwise mutual information of neighbours in a timeline; `cosine`: SVDs of their cosine and of who had what;
    `adapter`: a network from content and `cosine`, trained on neighbours."""
    min_collaborative_gain: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Refuse the collaborative signal, and take content alone, unless it finds this much more, relatively, of the neighbours in
    timelines that it has not seen."""
    cooccurrence_window: int = Field(10, ge=1)
    """Two items of one timeline this far apart or nearer count as co-occurring."""
    rq_vae: RqVaeConfig = RqVaeConfig()
    adapter: AdapterConfig = AdapterConfig()
    workers: int = Field(0, ge=0)
    """Ray actors that share the items; 0 works in the step's own process. Minibatches of `rq_vae` keep eight of them busy at most."""
    earlier: str = ""
    """Folder that an earlier step `semantic_ids` wrote, or a bundle, which knows the items added since: a new fit starts from its
    SIDs, keeps those it can and reports the churn."""
    freeze: bool = False
    """Fit nothing: items of `earlier` keep their SIDs, new ones are encoded on its codebooks."""
    max_collision_rate: float = Field(1.0, ge=0, le=1)
    """The run stops where more items than this share the codes that quantization gave them, before collisions are resolved."""
    min_utilisation: float = Field(0.0, ge=0, le=1)
    """The run stops where a level uses less of its codewords, before or after collisions are resolved."""

    @model_validator(mode="after")
    def _some_feature(self) -> Self:
        if self.text_weight + self.embedding_weight + self.collaborative_weight == 0:
            raise ValueError("text_weight, embedding_weight and collaborative_weight are all 0: no feature is left")
        return self

    @model_validator(mode="after")
    def _something_to_freeze(self) -> Self:
        if self.freeze and not self.earlier:
            raise ValueError("freeze keeps the SIDs of an earlier table: name its folder or bundle with semantic_ids.earlier")
        return self


class RetrieverConfig(Section):
    """The generative retriever: backbone, history representation and rank head."""

    backbone: str = "tiny"
    """`tiny` (a Qwen2 built from the sizes below) or the Hugging Face name, folder or s3:// folder of a Qwen2, Qwen3 or Llama."""
    hidden_size: int = Field(64, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    kv_heads: int = Field(2, ge=1)
    ff_size: int = Field(256, ge=8)
    dropout: float = Field(0.2, ge=0, lt=1)
    history: Literal["merged", "tokens"] = "merged"
    """`merged`: one position an item (GenRec Eq. 5, the token merger); `tokens`: one position a codeword (RankGR Eq. 6)."""
    history_levels: bool = True
    """Add an embedding of the feedback level to each history item."""
    history_min_level: int = Field(1, ge=1, le=4)
    """Events below this level are targets only, never history."""
    max_history: int = Field(128, ge=1)
    """Items of history that a prompt holds."""
    codeword_softmax: Literal["level", "children"] = "level"
    """`level`: over all codewords of a level (RankGR Eq. 4); `children`: over those that go on to an item, so that none of the
    probability is spent on SIDs without one, which counts where SIDs fill little of the code space."""
    codeword_init: Literal["random", "codebooks"] = "random"
    """`codebooks`: codewords start as the principal components of those that quantized the items, and the merger as their sum."""
    repeat_bias: bool = False
    """Learn how likely users are to come back to an item: a number added to the logit of the last codeword of items in the
    history. Attention over merged codewords learns only slowly that some things are bought once."""
    rank_heads: int = Field(2, ge=1)
    rank_mlp: int = Field(128, ge=1)
    rank_prior: Literal["iap", "none"] = "iap"
    """`iap`: the rank head corrects IAP's log odds of a codeword; `none`: it scores from nothing (RankGR Eq. 15 as printed)."""

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden_size % self.heads or self.heads % self.kv_heads or self.hidden_size % self.rank_heads:
            raise ValueError("hidden_size must be a multiple of heads and rank_heads, heads a multiple of kv_heads")
        return self


class LossConfig(Section):
    """Joint loss L = NTP + alpha LDPO + rsp_weight BCE (RankGR Eq. 17)."""

    ntp_level_weights: dict[FeedbackLevel, Annotated[float, Field(ge=0)]] = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}
    """Weight of a target's NTP loss by its feedback level (Eq. 10 is all ones)."""
    alpha: float = Field(1.0, ge=0)
    beta: float = Field(1.0, gt=0)
    rsp_weight: float = Field(1.0, ge=0)
    """0 trains no rank head (the ablation without RSP)."""
    train_lambdas: list[int] = [64, 64]
    """Codewords a level that the rank head is trained on: the most probable ones, the true ones forced in."""
    rsp_predictions: int = Field(16, ge=1)
    """Predictions a row and level that the rank head is trained on; a random sample where a row has more."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)


class TrainingConfig(Section):
    """Distributed training on Ray Train."""

    workers: int = Field(2, ge=1)
    epochs: int = Field(20, ge=1)
    rows_per_batch: int = Field(8, ge=1)
    """User rows of a batch of one worker."""
    tokens_per_batch: int | None = Field(None, ge=1)
    """Positions of a batch of one worker, padding included, in place of `rows_per_batch`; a longer row is a batch of its own."""
    accumulation_steps: int = Field(1, ge=1)
    """Batches of a worker that make one optimizer step, weighed as if they were one batch."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs matrix products in bfloat16 (autocast); weights, moments and losses stay in fp32."""
    gradient_checkpointing: bool = False
    """Compute the activations of the backbone's layers again in the backward pass: less memory, a third more time."""
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    """Decay a step of the moving average of the weights that is released; 0 releases the last weights."""
    target_days: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Only events of the last so many days of the training phase are targets, older ones are history: what is shown and liked
    changes, and long histories hold much that no longer is. null takes all."""
    history_dropout: float = Field(0.0, ge=0, lt=1)
    """Hide up to this share of a row's history from its targets, drawn anew in each epoch; short timelines of many items want it."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Of the learning rate after its warm-up; `cosine` and `linear` end at 0 after the last epoch."""
    loss: LossConfig = LossConfig()
    checkpoint_every_epochs: int = Field(2, ge=1)
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Checkpoints within an epoch too, for epochs that take hours."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many validations without a better HR, and release the best weights; null never validates."""
    validate_every_epochs: int = Field(1, ge=1)
    validation_k: int = Field(10, ge=1)
    """HR@k of positives in the VALID phase is what early stopping looks at."""
    validation_users: int | None = Field(1000, ge=1)
    """A random sample of this many users; null takes all."""
    start_from: str = ""
    """Bundle whose weights training starts from, on SIDs that its items keep (`semantic_ids.freeze`); empty: fresh weights."""
    max_failures: int = Field(2, ge=0)
    use_gpu: bool = False
    threads_per_worker: int = Field(1, ge=1)


class DecodingConfig(Section):
    """Two-stage beam search over the trie (RankGR Eq. 12, 18)."""

    beams: list[int] = [64, 200]
    """Beams kept after each level (the paper: 500, 1400)."""
    lambdas: list[int] = [64, 64]
    """Codewords per beam and level handed to the rank head (the paper: 1400, 1400)."""
    score: Literal["rsp", "iap", "sum"] = "sum"
    slate_size: int = Field(100, ge=1)
    exclude_seen: bool = True
    users_per_batch: int = Field(16, ge=1)


class EvaluationConfig(Section):
    """Full ranking of the catalogue, the same protocol for every method."""

    ks: list[int] = [5, 10, 20]
    truths: dict[str, FeedbackLevel] = {"positive": 3}
    """Name -> lowest level of an event that counts as a hit (KuaiRand: click 3, pv 2)."""
    max_users: int | None = None
    """Judge a random sample of this many users; null judges all."""
    examples: int = Field(3, ge=0)
    threads: int = Field(1, ge=1)
    """Of the retriever. Beam search is made of many small products, whose threads mostly wait for each other: on two cores with other
    work beside it, two threads were seven times slower than one."""


class GateConfig(Section):
    """When a model may become champion; what is missing or not a number fails."""

    metric: str = "ndcg@10"
    """Key of a method's figures in the evaluation report: metric@k for the first truth, truth/metric@k for further ones."""
    min_gain_over_baselines: float = 0.0
    """Relative gain over the best baseline that is asked for."""
    max_drop_from_champion: float = Field(0.05, ge=0)
    """Relative loss against the champion that is still accepted."""
    max_invalid_rate: float = Field(0.0, ge=0)


class RewardGateConfig(Section):
    """When a reward model is good enough for the run to be promoted; what is missing or not a number fails."""

    min_auc: float = Field(0.5, ge=0, le=1)
    """AUC on the test phase that each objective must reach."""
    objectives: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """Objective -> the AUC that it must reach. Where any are named, the others are only reported: those that are rare may have
    too few positives to be judged by."""
    min_gain_over_baseline: float = Field(0.0, ge=-1, le=1)
    """What the AUC must be above that of a logistic regression on user and item rates."""


class RewardConfig(Section):
    """The reward model (OneRec 3.3.1): what a user would do with a session of items, fitted on the signals of the log."""

    objectives: list[str] = []
    """Names of `data.columns.signals` to foresee, a tower each; empty takes all."""
    thresholds: dict[str, float] = {}
    """Signal -> value from which on it counts as given; a signal that is not named here counts where it is above 0."""
    hidden_size: int = Field(64, ge=4)
    heads: int = Field(2, ge=1)
    tower_size: int = Field(64, ge=1)
    dropout: float = Field(0.3, ge=0, lt=1)
    max_behaviour: int = Field(64, ge=1)
    """Events before a request that are looked at, whatever their level."""
    epochs: int = Field(3, ge=1)
    batch: int = Field(512, ge=1)
    """Sessions a step."""
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.5, ge=0)
    """High, since most items are met so seldom that their vectors would remember single events."""
    patience: int = Field(2, ge=1)
    """Epochs without a lower loss of the validation phase after which fitting stops; the best weights are kept."""
    threads: int = Field(1, ge=1)
    gate: RewardGateConfig = RewardGateConfig()

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError("hidden_size must be a multiple of heads")
        return self
