"""Where the steps of a compiled pipeline run on Kubernetes: resources, GPUs, nodes, secrets by reference, retries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kfp import dsl, kubernetes

from infra.errors import ConfigError

SECRET_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "RANKGR_REDIS_URL",
    "RAY_AUTH_TOKEN",
)
"""Keys of the secret, which become environment variables of the same names; each of them may be missing."""

Size = Literal["light", "heavy", "gpu"]
_REQUESTS = {"light": ("200m", "1", "512Mi", "2Gi"), "heavy": ("2", "4", "4Gi", "8Gi"), "gpu": ("4", "8", "16Gi", "32Gi")}


@dataclass(frozen=True)
class Placement:
    """Settings of the compiled file; those of a run are its parameters.

    Attributes:
        gpus: of a training step that does its work itself; a step that submits a Ray job takes none.
        gpu_type: resource name of a GPU.
        node_selector: label -> value, for the steps that do heavy work.
        tolerations: taints that these steps bear, `key[=value]:effect`.
        secret: name of the Kubernetes secret with `SECRET_KEYS`; empty for none.
        retries: of a step, with back-off from 30 seconds to 10 minutes.
    """

    gpus: int = 0
    gpu_type: str = "nvidia.com/gpu"
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: Sequence[str] = ()
    secret: str = "rankgr"  # noqa: S105 - a name
    retries: int = 3

    def place(self, task: dsl.PipelineTask, image: str, size: Size = "light") -> dsl.PipelineTask:
        """Apply it all to a task. Steps skip finished work by content; KFP's cache would only see equal URIs, so it is off."""
        cpu, cpu_limit, memory, memory_limit = _REQUESTS["heavy" if size == "gpu" and not self.gpus else size]
        task.set_caching_options(enable_caching=False)
        task.set_container_image(image)
        task.set_cpu_request(cpu).set_cpu_limit(cpu_limit).set_memory_request(memory).set_memory_limit(memory_limit)
        if size == "gpu" and self.gpus:
            task.set_accelerator_type(self.gpu_type).set_accelerator_limit(self.gpus)
        if size != "light":
            for label, value in self.node_selector.items():
                kubernetes.add_node_selector(task, label, value)
            for text in self.tolerations:
                kubernetes.add_toleration(task, **toleration_of(text))
        if self.secret:
            kubernetes.use_secret_as_env(task, self.secret, {key: key for key in SECRET_KEYS}, optional=True)
        if self.retries:
            task.set_retry(self.retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
        return task


DEFAULT = Placement()


def toleration_of(text: str) -> dict[str, str]:
    """`key[=value]:effect` as the arguments of a toleration.

    Raises:
        ConfigError: it is not of that form.
    """
    taint, _, effect = text.rpartition(":")
    key, equals, value = taint.partition("=")
    if not key or effect not in ("NoSchedule", "PreferNoSchedule", "NoExecute"):
        raise ConfigError(f"cannot read the toleration {text!r}", mend="write key=value:NoSchedule, or key:NoSchedule")
    return (
        {"key": key, "operator": "Equal", "value": value, "effect": effect}
        if equals
        else {"key": key, "operator": "Exists", "effect": effect}
    )
