"""The main job, end to end at the smallest preset: real Ray, Kubeflow's local runner, MLflow, Valkey and Serve."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import yaml

from infra import storage
from infra.config import load_config
from infra.steps import latest_run, remember_run, run_records
from infra.tracking import Registry
from tests.command import Finished, rankgr, rankgr_here
from tests.logs import SETTINGS

STEPS = ["evaluation", "gate", "precompute", "release", "reward", "semantic_ids", "sessions", "training"]


def test_it_ends_well_and_shows_titles_fetched_over_http(finished: Finished) -> None:
    assert finished.first.returncode == 0, finished.first.stderr[-3000:]
    assert "slates fetched over HTTP" in finished.first.stdout
    assert len(re.findall(r"Thing number \d+  -?\d", finished.first.stdout)) == 15


def test_the_long_step_shows_rate_and_time_left(finished: Finished) -> None:
    assert re.search(r"\d+/\d+ steps .*eta=\d+s.*rate=[\d.]+/s", finished.first.stderr)


def test_bad_rows_are_quarantined_with_their_reason(finished: Finished) -> None:
    (quarantine,) = (finished.folder / ".rankgr/steps/sessions").glob("*/quarantine/events.parquet")
    table = storage.read_table(str(quarantine))
    assert table["reason"].to_pylist() == ["the level is not one of 1, 2, 3, 4"] * 3
    assert json.loads(table["raw"][0].as_py()) == {"uid": "u0", "sku": "sku-00", "at": "1700000000", "liked": "0", "stage": "9"}


def test_the_report_has_all_methods_and_the_seconds_of_each_step(finished: Finished) -> None:
    report = json.loads(rankgr("report", "--json", folder=finished.folder).stdout)
    for method in ("retriever", "item_knn", "popularity"):
        assert 0 <= report[method]["ndcg@10"] <= report[method]["hr@10"] <= 1
    assert report["invalid_rate"] == 0
    assert sorted(report["seconds"]) == STEPS
    assert report["gate"]["promoted"] is True


def test_the_reward_model_is_fitted_and_weighed_by_the_gate(finished: Finished) -> None:
    report = json.loads(rankgr_here("report", "--json", folder=finished.folder).stdout)
    like = report["reward"]["like"]
    assert like["events"] > like["positives"] > 0
    assert any(f"AUC(like) {like['auc']:.4f}" in reason for reason in report["gate"]["reasons"])
    assert "reward model: AUC(like)" in finished.first.stdout


def test_a_reward_model_that_is_refused_keeps_the_run_from_being_promoted(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.folder / ".rankgr", tmp_path / ".rankgr")
    refused = rankgr("run", *finished.arguments[1:7], *SETTINGS, "--set", "reward.gate.objectives={like: 1, share: 0.6}", folder=tmp_path)
    assert refused.returncode == 0, refused.stderr[-3000:]
    assert "NOT promoted" in refused.stdout
    assert "the reward model has no share" in refused.stdout
    assert refused.stderr.count("skipped: finished before") == len(STEPS) - 3


def test_artifacts_and_the_mlflow_run_name_the_folders_of_the_steps_they_came_from(finished: Finished) -> None:
    workspace = str(finished.folder / ".rankgr")
    registry = Registry(load_config(overrides=[f"workspace={workspace}"]).tracking, workspace)
    champion = registry.champion()
    assert champion is not None
    mlflow_run = registry.run_of(champion.number)
    tags = {key: value for key, value in registry.client.get_run(mlflow_run).data.tags.items() if key.startswith("rankgr.")}
    run_id = tags.pop("rankgr.run_id")
    uris = {name: record.uri for name, record in run_records(workspace, run_id).items()}
    assert tags == {f"rankgr.{name}": uris[name] for name in ("sessions", "semantic_ids", "training", "evaluation")}
    outputs = [json.loads(path.read_text()) for path in Path(workspace, "kfp").rglob("executor_output.json")]
    told = [made["artifacts"][0]["metadata"] for output in outputs for made in output.get("artifacts", {}).values()]
    of_the_run = {metadata["folder"]: metadata for metadata in told if metadata.get("run_id") == run_id}
    assert set(of_the_run) == set(uris.values())
    assert of_the_run[uris["release"]]["mlflow_run"] == mlflow_run


def test_the_page_needs_nothing_from_outside(finished: Finished) -> None:
    path = re.search(r"report: (\S+)", finished.first.stdout)
    assert path is not None
    page = storage.read_bytes(path.group(1)).decode()
    assert "<svg" in page
    assert "Thing number" in page
    assert not re.search(r"""(src|href)=["']https?://""", page)


def test_a_second_run_skips_every_finished_step_and_serves_the_same_slates(finished: Finished) -> None:
    second = rankgr(*finished.arguments, folder=finished.folder)
    assert second.returncode == 0, second.stderr[-3000:]
    assert second.stderr.count("skipped: finished before") == len(STEPS)
    shown = "slates fetched over HTTP"
    table = lambda text: text[text.index(shown) : text.index("items ranked in full")].splitlines()[:-1]  # noqa: E731
    assert table(second.stdout) == table(finished.first.stdout)


def test_a_changed_setting_redoes_only_what_depends_on_it(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.folder / ".rankgr", tmp_path / ".rankgr")
    changed = rankgr("evaluate", *finished.arguments[1:7], *SETTINGS, "--set", "evaluation.ks=[10]", folder=tmp_path)
    assert changed.returncode == 0, changed.stderr[-3000:]
    assert changed.stderr.count("skipped: finished before") == 3
    assert "started" in next(line for line in changed.stderr.splitlines() if "step=evaluation" in line)


def test_precompute_publishes_the_champion_when_the_last_run_released_nothing(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.folder / ".rankgr", tmp_path / ".rankgr", ignore=shutil.ignore_patterns("valkey"))
    workspace = str(tmp_path / ".rankgr")
    _, records = latest_run(workspace)
    remember_run(workspace, "evaluated")
    published = rankgr("precompute", "--preset", "tiny", folder=tmp_path)
    assert published.returncode == 0, published.stderr[-3000:]
    assert f"version {records['release'].metadata['version']}" in published.stdout
    assert "slates are active" in published.stderr


def test_recommend_decodes_a_slate_without_any_service(finished: Finished) -> None:
    done = rankgr("recommend", "u1", "-k", "4", folder=finished.folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Thing number") == 4


def test_the_file_for_serve_deploy_names_the_champion(finished: Finished, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    written = rankgr_here("serve", "--write-config", str(file), folder=finished.folder)
    assert written.returncode == 0, written.stderr
    assert f"serve deploy {file}" in written.stdout
    (application,) = yaml.safe_load(file.read_text())["applications"]
    assert storage.exists(storage.join(application["args"]["bundle"], "model.safetensors"))


def test_an_unknown_user_is_named(finished: Finished) -> None:
    done = rankgr_here("recommend", "nobody", folder=finished.folder)
    assert done.returncode == 3
    assert "user 'nobody' is not in the logs" in done.stderr
