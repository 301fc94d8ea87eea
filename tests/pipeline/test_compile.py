"""The pipeline compiles for a cluster, without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from tests.command import ROOT, environment, rankgr


def test_importing_the_pipeline_imports_neither_torch_nor_ray() -> None:
    script = "import sys, pipelines.training; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_committed_yaml_is_what_the_code_compiles_to(tmp_path: Path) -> None:
    output = tmp_path / "training.yaml"
    assert rankgr("compile", "-o", str(output), folder=tmp_path).returncode == 0
    assert output.read_text() == (ROOT / "pipelines/compiled/training.yaml").read_text(), "run `rankgr compile` and commit"


def test_slates_are_only_computed_for_a_model_that_passed_the_gate() -> None:
    pipeline, *_ = yaml.safe_load_all((ROOT / "pipelines/compiled/training.yaml").read_text())
    (guarded,) = [task for task in pipeline["root"]["dag"]["tasks"].values() if "triggerPolicy" in task]
    inner = pipeline["components"][guarded["componentRef"]["name"]]["dag"]["tasks"]
    assert sorted(inner) == ["precompute-slates", "release-bundle"]
    assert "decide-promotion" in guarded["triggerPolicy"]["condition"]


def test_the_reward_model_is_fitted_beside_training_and_weighed_by_the_gate() -> None:
    pipeline, *_ = yaml.safe_load_all((ROOT / "pipelines/compiled/training.yaml").read_text())
    tasks = pipeline["root"]["dag"]["tasks"]
    assert tasks["fit-reward-model"]["dependentTasks"] == ["prepare-sessions"]
    assert "fit-reward-model" in tasks["decide-promotion"]["dependentTasks"]
