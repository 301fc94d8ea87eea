"""Where compiled steps run: what an option becomes in the compiled file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler

from infra.errors import ConfigError
from pipelines.placement import SECRET_KEYS, Placement, toleration_of
from pipelines.training import training_pipeline


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pipeline and platform documents of a file with GPUs on nodes of their own."""
    placement = Placement(gpus=2, node_selector={"pool": "gpu"}, tolerations=["nvidia.com/gpu:NoSchedule"], secret="keys", retries=5)  # noqa: S106 - a name
    file = tmp_path_factory.mktemp("compiled") / "training.yaml"
    compiler.Compiler().compile(training_pipeline(placement), str(file))
    pipeline, platform = yaml.safe_load_all(Path(file).read_text())
    return pipeline, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_training_asks_for_its_gpus_and_the_gate_for_none(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    executors = compiled[0]["deploymentSpec"]["executors"]
    assert executors["exec-train-retriever"]["container"]["resources"]["accelerator"]["resourceCount"] == "2"
    assert "accelerator" not in executors["exec-decide-promotion"]["container"]["resources"]


def test_every_step_has_requests_limits_and_the_image_of_the_run(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for name, executor in compiled[0]["deploymentSpec"]["executors"].items():
        resources = executor["container"]["resources"]
        assert {"resourceCpuRequest", "resourceCpuLimit", "resourceMemoryRequest", "resourceMemoryLimit"} <= set(resources), name
        assert "image" in executor["container"]["image"], name


def test_every_step_is_tried_again_with_back_off(compiled: tuple[dict[str, Any], dict[str, Any]]) -> None:
    dags = [compiled[0]["root"]["dag"], *(c["dag"] for c in compiled[0]["components"].values() if "dag" in c)]
    steps = [
        task for dag in dags for task in dag["tasks"].values() if not task["componentRef"]["name"].startswith(("comp-exit", "comp-cond"))
    ]
    assert {task["retryPolicy"]["maxRetryCount"] for task in steps} == {5}
    assert {task["retryPolicy"]["backoffDuration"] for task in steps} == {"30s"}


def test_secrets_come_by_reference_and_only_heavy_steps_go_to_the_nodes_of_their_own(
    compiled: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    platform = compiled[1]
    for executor in platform.values():
        (secret,) = executor["secretAsEnv"]
        assert secret["secretName"] == "keys"
        assert [entry["envVar"] for entry in secret["keyToEnv"]] == list(SECRET_KEYS)
        assert secret["optional"] is True
    assert platform["exec-train-retriever"]["nodeSelector"] == {"labels": {"pool": "gpu"}}
    assert platform["exec-train-retriever"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert "nodeSelector" not in platform["exec-decide-promotion"]


def test_a_toleration_is_read_or_refused() -> None:
    assert toleration_of("pool=gpu:NoExecute") == {"key": "pool", "operator": "Equal", "value": "gpu", "effect": "NoExecute"}
    assert toleration_of("spot:NoSchedule") == {"key": "spot", "operator": "Exists", "effect": "NoSchedule"}
    for text in ("spot", "spot:Never", ":NoSchedule"):
        with pytest.raises(ConfigError, match="cannot read the toleration"):
            toleration_of(text)
