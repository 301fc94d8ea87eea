"""The sections of the configuration: a frozen pydantic model per stage, each setting with its range and meaning."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from infra.credentials import SecretRef

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


class TrackingConfig(Section):
    """MLflow."""

    uri: str = ""
    """Tracking server; empty: SQLite in the workspace."""
    experiment: str = "rankgr"
    model_name: str = "rankgr-retriever"


class SlateStoreConfig(Section):
    """Redis (or Valkey) with the slates."""

    url: str = ""
    """redis:// or rediss:// URL; empty: RANKGR_REDIS_URL, else a Valkey of our own in the workspace."""
    prefix: str = "rankgr"
    """First part of every key; tenants have different ones."""
    username: SecretRef = ""
    """User of Redis' access rules, as `env:NAME` or `file:PATH`; resolved by each process that connects."""
    password: SecretRef = ""
    """Password, in the same way; neither is needed where the URL holds them."""
    ca_file: str = ""
    """Certificate authority of a rediss:// server; empty: those of the system."""
    ttl_hours: float = Field(72.0, gt=0)
    keep_versions: int = Field(2, ge=1)
    """So many of the newest versions stay, whether active or not; the active one stays in any case."""
    grace_minutes: float = Field(60.0, ge=0)
    """How long a version stays after it was last the active one, for a way back."""


class ServingConfig(Section):
    """Ray Serve."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """0 takes a free port."""
    retrieval_replicas: int = Field(1, ge=1)
    precompute_min_replicas: int = Field(1, ge=0)
    """With 0 replicas start when they are asked for something, and the first early requests wait for them."""
    precompute_max_replicas: int = Field(2, ge=1)
    batch_wait_ms: float = Field(5.0, ge=0)
    """How long a precompute replica waits for more users before it computes."""
    max_pending: int = Field(200, ge=1)
    """Fresh slates under way in one ingress replica; further early requests are answered 429."""
    deadline_s: float = Field(10.0, gt=0)
    """A fresh slate that is not there after so long is given up: the user has gone on."""
    fresh_minutes: float = Field(30.0, ge=0)
    """How long a slate that was computed on request is called fresh."""
    stale_hours: float = Field(24.0, gt=0)
    """An older slate is served and computed anew, once."""
    sync_minutes: float = Field(60.0, gt=0)
    """How often the registry is asked for another champion, whose weights are then swapped in."""
    refresh_share: float = Field(0.1, gt=0, le=1)
    """Share of the time after a swap in which model replicas compute the new slates. Readers on the same cores gain from a small one;
    1 where model replicas have cores, or GPUs, of their own."""
    precompute_actors: int = Field(2, ge=1)
    """Ray Data actors of the batch job that fills the slate store."""
    tokens: list[Annotated[SecretRef, Field(min_length=1)]] = []
    """Tokens that requests which may change something must bring, as `env:NAME` or `file:PATH`: several while one replaces another.
    Empty asks for none, which only the loopback interface may."""


class StreamingConfig(Section):
    """Training on what users do now, and the hourly release of what came of it (RankGR 3.4)."""

    max_length: int = Field(1_000_000, ge=1)
    """Events that the stream keeps, give or take a few; a trainer that falls further behind misses some, and counts them."""
    max_age_hours: float | None = Field(168.0, gt=0)
    """An event that is older than this when it arrives is quarantined; null takes all, for backfills."""
    window: int = Field(50_000, ge=1)
    """A copy of one of the latest so many events is dropped."""
    events_per_step: int = Field(256, ge=1)
    """Entries of the stream that make one optimizer step."""
    step_wait_s: float = Field(60.0, ge=0)
    """A step is made of fewer events where no more came for this long."""
    learning_rate: float = Field(1e-4, gt=0)
    """Constant; the other settings of an optimizer step are those that the model was trained with."""
    ema_decay: float | None = Field(None, ge=0, lt=1)
    """Decay a step of the moving average that is released; null takes that of training, which looks hundreds of steps back: too far
    for a stream of a few dozen steps an hour."""
    ntp_level_weights: dict[FeedbackLevel, Annotated[float, Field(ge=0)]] | None = None
    """Weight of a target's next-token loss by its feedback level; null takes those of training. A model that was trained on something
    else than what the service shows, as on ratings, wants others here: shown and passed by (2) says less than a low rating. They weigh
    earlier rows too, and leave LDPO and the rank head as they are."""
    replay_share: float = Field(0.5, ge=0, lt=1)
    """Of the rows of a step, how many are earlier ones, against forgetting."""
    replay_rows: int = Field(20_000, ge=0)
    """A uniform sample of this many earlier rows is kept; it begins with those that the model was trained on."""
    users: int = Field(20_000, ge=1)
    """Users whose timelines are kept; those seen last. Others begin with what the last run knew of them."""
    checkpoint_every_s: float = Field(30.0, ge=0)
    checkpoints: int = Field(3, ge=1)
    """Newest ones that are kept."""
    max_loss_rise: float = Field(2.0, gt=1)
    """Go back to the last checkpoint, and leave out the events since, where the running mean of the loss exceeds its value there
    by this factor."""
    max_drift: float = Field(0.5, gt=0)
    """The same where the weights are this far from the served ones, relative to their length."""
    max_rollbacks: int = Field(3, ge=1)
    """The trainer stops after this many in a row."""
    sync_every_s: float = Field(3600.0, ge=0)
    """How often the averaged weights face the gate and, if they pass, are released."""
    gate_users: int = Field(500, ge=1)
    """Users with a positive, among those seen after the weights were set aside, on whom these and the served ones are judged."""
    max_outage_s: float = Field(600.0, ge=0)
    """How long the trainer waits for a Redis that does not answer."""
    metrics_host: str = "127.0.0.1"
    """Where Prometheus finds the trainer's metrics; they are open to whoever reaches it."""
    metrics_port: int = Field(8001, ge=0, le=65535)
    """0 takes a free port."""


class SimulationConfig(Section):
    """Users who click by a model of their tastes, to see how fast the service follows when these change (`rankgr simulate`)."""

    hours: int = Field(16, ge=2)
    """Simulated; at the end of each, what happened in it is trained on and the service is brought in step."""
    shift_hour: int = Field(5, ge=1)
    """When tastes change."""
    shift_share: float = Field(0.8, ge=0, le=1)
    """How much of each taste turns to another group of items then, and how many items exchange their appeal; 0: nothing changes."""
    visits_per_hour: int = Field(200, ge=1)
    """By different users, as far as there are so many."""
    slate_size: int = Field(10, ge=1)
    groups: int = Field(8, ge=2)
    """Groups of items of like users that tastes are made of."""
    position_bias: float = Field(0.3, ge=0)
    """An item comes into view with the chance (1 / its rank) to this power; 0: all of a slate do."""
    click_rate: float = Field(0.6, gt=0, le=1)
    """Chance of a click on an item in view that suits as well as any could."""
    purchase_rate: float = Field(0.2, ge=0, le=1)
    """Chance that such an item is bought after a click (level 4)."""
    found_per_visit: float = Field(1.0, ge=0)
    """Items that a user comes upon elsewhere, by taste alone: events, but none of the service's clicks."""

    @model_validator(mode="after")
    def _shift_within(self) -> Self:
        if self.shift_hour >= self.hours:
            raise ValueError(f"shift_hour {self.shift_hour} lies behind the last hour: make it less than hours, {self.hours}")
        return self


class ClusterConfig(Section):
    """Ray."""

    address: str = ""
    """ray:// or host:port; empty: RAY_ADDRESS, else a local cluster that ends with the command."""
    jobs_url: str = ""
    """Jobs API of a Ray cluster (http://host:8265): heavy steps of a Kubeflow run are submitted there, which wants a workspace that the
    cluster reaches. Empty: they run in the step's own container."""
    jobs_upload: bool = True
    """Send this code along with a job; false where the cluster's image has it."""
    job_cpus: float = Field(1.0, ge=0)
    """Logical CPUs that the driver of a job takes; its workers take theirs."""
    cpus: int = Field(4, ge=2)
    """Logical CPUs of a local cluster (workers and replicas share the real cores)."""
    object_store_mb: int = Field(256, ge=80)
