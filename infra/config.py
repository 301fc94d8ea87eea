"""The one schema of all settings: a frozen pydantic model with a sub-model per stage.

A configuration is layered: defaults <- preset <- YAML file <- `--set key=value`. Unknown keys are refused with the
nearest known one; `rankgr config schema` prints the whole schema.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ValidationError, model_validator

from infra import storage
from infra.errors import ConfigError, StorageError
from infra.sections import (
    DataConfig,
    DecodingConfig,
    EvaluationConfig,
    GateConfig,
    RetrieverConfig,
    RewardConfig,
    Section,
    SemanticIdConfig,
    SplitConfig,
    TrainingConfig,
)
from infra.service_sections import ClusterConfig, ServingConfig, SimulationConfig, SlateStoreConfig, StreamingConfig, TrackingConfig

PRESETS = ("tiny", "small", "beauty", "kuairand", "paper")


class Config(Section):
    """All settings of a run."""

    workspace: str = ".rankgr"
    """Folder or s3:// URI for all that a run writes."""
    seed: int = 0
    data: DataConfig = DataConfig()
    split: SplitConfig = SplitConfig()
    semantic_ids: SemanticIdConfig = SemanticIdConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    training: TrainingConfig = TrainingConfig()
    decoding: DecodingConfig = DecodingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    reward: RewardConfig = RewardConfig()
    tracking: TrackingConfig = TrackingConfig()
    slate_store: SlateStoreConfig = SlateStoreConfig()
    serving: ServingConfig = ServingConfig()
    streaming: StreamingConfig = StreamingConfig()
    simulation: SimulationConfig = SimulationConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        m = self.semantic_ids.levels
        for name, values in (
            ("decoding.beams", self.decoding.beams),
            ("decoding.lambdas", self.decoding.lambdas),
            ("training.loss.train_lambdas", self.training.loss.train_lambdas),
        ):
            if len(values) != m:
                raise ValueError(f"{name} has {len(values)} entries but semantic_ids.levels is {m}: give one per level")
            if min(values) < 1:
                raise ValueError(f"{name} must be positive")
        return self

    @model_validator(mode="after")
    def _absolute_paths(self) -> Self:
        # Steps and Ray workers run in other folders than the command.
        object.__setattr__(self, "workspace", _absolute(self.workspace))
        files = {name: _absolute(getattr(self.data, name)) for name in ("logs", "items")}
        object.__setattr__(self, "data", self.data.model_copy(update=files))
        earlier = {"earlier": _absolute(self.semantic_ids.earlier)}
        object.__setattr__(self, "semantic_ids", self.semantic_ids.model_copy(update=earlier))
        object.__setattr__(self, "training", self.training.model_copy(update={"start_from": _absolute(self.training.start_from)}))
        return self

    @model_validator(mode="after")
    def _rank_head_was_trained_on_what_it_scores(self) -> Self:
        trained, scored = self.training.loss.train_lambdas, self.decoding.lambdas
        if self.decoding.score != "iap" and any(s > t for s, t in zip(scored, trained, strict=True)):
            raise ValueError(
                f"decoding.lambdas {scored} exceed training.loss.train_lambdas {trained}: the rank head would score codewords of ranks "
                "that it was never trained on; lower the first, raise the second, or set decoding.score=iap"
            )
        if self.decoding.score != "iap" and self.training.loss.rsp_weight == 0:
            raise ValueError("training.loss.rsp_weight is 0, so no rank head is trained: set decoding.score=iap")
        return self

    @model_validator(mode="after")
    def _smoothing_has_somewhere_to_go(self) -> Self:
        if self.training.loss.label_smoothing > 0 and self.retriever.codeword_softmax == "children":
            raise ValueError(
                "training.loss.label_smoothing would give probability to codewords that retriever.codeword_softmax=children rules out: "
                "set one of them back"
            )
        return self

    @model_validator(mode="after")
    def _objectives_are_signals(self) -> Self:
        signals = self.data.columns.signals
        unknown = sorted({*self.reward.objectives, *self.reward.thresholds} - set(signals))
        if signals and unknown:
            raise ValueError(
                f"reward.objectives and reward.thresholds name {', '.join(unknown)}, but data.columns.signals has {', '.join(signals)}: "
                "name the column there, or leave the objective out"
            )
        return self

    def public(self) -> Config:
        """The same configuration without addresses of services, which may hold passwords: for bundles, reports, MLflow."""
        store, tracking = self.slate_store.model_copy(update={"url": ""}), self.tracking.model_copy(update={"uri": ""})
        return self.model_copy(update={"slate_store": store, "tracking": tracking})

    def to_json(self) -> str:
        """The whole configuration as canonical JSON, the form that travels between steps."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Inverse of `to_json`."""
        return _validate(json.loads(text))


def _absolute(path: str) -> str:
    return path if not path or "://" in path else str(Path(path).resolve())


def load_config(
    path: str | None = None,
    *,
    preset: str | None = None,
    overrides: Iterable[str] = (),
    base: Mapping[str, Any] | None = None,
    fallback_preset: str | None = None,
) -> Config:
    """Build a configuration from its layers.

    Args:
        path: YAML file, or JSON by its ending, local or s3://; may name a `preset:` of its own.
        preset: one of `PRESETS`.
        overrides: `key.subkey=value` strings, the values read as YAML.
        base: settings on top of the preset, below the file.
        fallback_preset: used where neither `preset` nor the file names one.

    Raises:
        ConfigError: a file that is missing or no mapping, an unknown key (with the nearest known one), a bad value.
    """
    settings: dict[str, Any] = {}
    from_file = read_settings(path) if path else {}
    preset = preset or from_file.pop("preset", None) or fallback_preset
    from_file.pop("preset", None)
    if preset:
        _merge(settings, preset_settings(preset))
    _merge(settings, dict(base or {}))
    _merge(settings, from_file)
    for text in overrides:
        key, sep, value = text.partition("=")
        if not sep or not key:
            raise ConfigError(f"cannot read the override {text!r}", mend="write --set key.subkey=value")
        try:
            _assign(settings, key.strip().split("."), yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of --set {key} is not valid YAML", where=value, mend="quote it") from error
    return _validate(settings)


def preset_settings(name: str) -> dict[str, Any]:
    """Settings of a named preset."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}", mend=f"choose one of {', '.join(PRESETS)}")
    text = resources.files("infra").joinpath("presets", f"{name}.yaml").read_text("utf-8")
    return dict(yaml.safe_load(text) or {})


def read_settings(uri: str) -> dict[str, Any]:
    """Settings of a YAML or JSON file, unchecked.

    Raises:
        ConfigError: it cannot be read, or holds no mapping.
    """
    try:
        if storage.is_local(uri) and not Path(storage.filesystem(uri)[1]).exists():
            raise ConfigError("the configuration file does not exist", where=uri, mend="check --config")
        text = storage.read_bytes(uri).decode()
        content = json.loads(text) if uri.endswith(".json") else yaml.safe_load(text)  # YAML takes 1e-05 for a string
    except StorageError as error:
        raise ConfigError(f"the configuration file cannot be read: {error.what}", where=uri, mend=error.mend) from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError("the configuration file cannot be read as YAML", where=f"{uri}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError("the configuration file must hold a mapping", where=uri, mend="write `key: value` lines")
    return content


def _merge(into: dict[str, Any], new: Mapping[str, Any], section: type[BaseModel] = Config) -> None:
    """Lay `new` over `into`: sections are merged, every other value is replaced, mappings (level weights, rules) too."""
    for key, value in new.items():
        inner = _section_of(section, key)
        if inner and isinstance(value, Mapping):
            nested = into.get(key)
            into[key] = nested = nested if isinstance(nested, dict) else {}
            _merge(nested, value, inner)
        else:
            into[key] = copy.deepcopy(value)


def _section_of(section: type[BaseModel], key: str) -> type[BaseModel] | None:
    field = section.model_fields.get(key)
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _assign(into: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        nested = into.setdefault(key, {})
        if not isinstance(nested, dict):
            raise ConfigError(f"{'.'.join(keys)} does not name a setting: {key} is a value", mend="see `rankgr config show`")
        into = nested
    into[keys[-1]] = value


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted keys of the schema."""
    keys: list[str] = []
    for name in model.model_fields:
        keys.append(prefix + name)
        if inner := _section_of(model, name):
            keys += known_keys(inner, f"{prefix}{name}.")
    return keys


def _validate(settings: Mapping[str, Any]) -> Config:
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        lines, unknown = [], False
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                unknown = True
                candidates = known_keys()
                named = [c for c in candidates if c.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
                near = sorted(named, key=lambda c: c.count("."))[:1] or difflib.get_close_matches(key, candidates, n=1, cutoff=0.5)
                tail = {c.rsplit(".", 1)[-1]: c for c in reversed(candidates)}
                near = near or [tail[n] for n in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(tail), n=1)]
                lines.append(f"unknown setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            else:
                lines.append(f"{key or 'configuration'}: {problem['msg']}")
        mend = "`rankgr config schema` lists every key" if unknown else "`rankgr config schema` gives types and ranges"
        raise ConfigError("; ".join(lines), mend=mend) from None
