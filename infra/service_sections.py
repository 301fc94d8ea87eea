"""The sections of the configuration on what surrounds the model: MLflow, Redis, Ray Serve, the stream, the simulator, Ray."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from infra.credentials import SecretRef
from infra.sections import FeedbackLevel, Section


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
    refresh_share: float = Field(0.03, gt=0, le=1)
    """Share of the time after a swap in which model replicas compute the new slates, those of eight users at once, with pauses of 30 s at
    most. Readers on the same cores gain from a small one; 1 where model replicas have cores, or GPUs, of their own."""
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
    """Users whose timelines are kept; those seen last. Others begin with what the run that the champion came from knew of them."""
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
