"""The pipeline compiles for a cluster, without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.command import ROOT, environment, rankgr


def test_building_the_pipelines_imports_neither_torch_nor_ray() -> None:
    built = "pipelines.training.training_pipeline(); pipelines.refresh.refresh_pipeline()"
    script = f"import sys, pipelines.refresh, pipelines.training; {built}; print(sorted({{'torch', 'ray'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_committed_files_are_what_the_code_compiles_to(tmp_path: Path) -> None:
    assert rankgr("compile", "-o", str(tmp_path), folder=tmp_path).returncode == 0
    for name in ("training.yaml", "refresh.yaml"):
        assert (tmp_path / name).read_text() == (ROOT / "pipelines/compiled" / name).read_text(), "run `rankgr compile` and commit"


@pytest.fixture(params=["training", "refresh"])
def pipeline(request: pytest.FixtureRequest) -> dict[str, Any]:
    first, *_ = yaml.safe_load_all((ROOT / f"pipelines/compiled/{request.param}.yaml").read_text())
    return dict(first)


def dags_of(pipeline: dict[str, Any]) -> list[dict[str, Any]]:
    """The whole and its parts."""
    return [pipeline["root"]["dag"], *(component["dag"] for component in pipeline["components"].values() if "dag" in component)]


def guarded_by(pipeline: dict[str, Any], what: str) -> list[str]:
    """Steps in the part of a pipeline whose condition names something."""
    tasks = [task for dag in dags_of(pipeline) for task in dag["tasks"].values()]
    (guarded,) = [task for task in tasks if what in task.get("triggerPolicy", {}).get("condition", "")]
    return sorted(pipeline["components"][guarded["componentRef"]["name"]]["dag"]["tasks"])


def test_slates_are_only_computed_for_a_model_that_passed_the_gate(pipeline: dict[str, Any]) -> None:
    assert guarded_by(pipeline, "decide-promotion") == ["precompute-slates", "release-bundle"]


def test_a_dry_run_does_nothing_but_check(pipeline: dict[str, Any]) -> None:
    assert "prepare-sessions" in guarded_by(pipeline, "dry_run")
    assert "validate-parameters" not in guarded_by(pipeline, "dry_run")


def test_whatever_happens_the_outcome_is_reported(pipeline: dict[str, Any]) -> None:
    assert pipeline["root"]["dag"]["tasks"]["report-outcome"]["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}


def test_every_parameter_says_what_it_is(pipeline: dict[str, Any]) -> None:
    parameters = pipeline["root"]["inputDefinitions"]["parameters"]
    assert {"preset", "logs_uri", "items_uri", "overrides", "dry_run", "image"} <= set(parameters)
    assert all(parameter["description"] for parameter in parameters.values())


def test_the_reward_model_is_fitted_beside_training_and_weighed_by_the_gate(pipeline: dict[str, Any]) -> None:
    (tasks,) = [dag["tasks"] for dag in dags_of(pipeline) if "fit-reward-model" in dag["tasks"]]
    assert tasks["fit-reward-model"]["dependentTasks"] == ["prepare-sessions"]
    assert "fit-reward-model" in tasks["decide-promotion"]["dependentTasks"]
