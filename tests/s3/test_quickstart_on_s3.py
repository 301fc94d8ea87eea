"""The main job with every artifact on S3 and MLflow as a server: logs, workspace, checkpoints, bundle, registry, slates served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from mlflow import MlflowClient

from infra import storage
from infra.config import load_config
from infra.tracking import Registry
from tests.command import rankgr, rankgr_here
from tests.logs import COLUMNS, write_log
from tests.s3.conftest import BUCKET, S3

WORKSPACE = f"s3://{BUCKET}/workspace"
STEPS = ["evaluation", "gate", "precompute", "release", "reward", "semantic_ids", "sessions", "training"]


@dataclass(frozen=True)
class OnS3:
    folder: Path
    settings: tuple[str, ...]
    done: CompletedProcess[str]
    tracking: str


@pytest.fixture(scope="module")
def on_s3(s3: S3, mlflow: Callable[[], str], valkey_server: str, tmp_path_factory: pytest.TempPathFactory) -> OnS3:
    folder = tmp_path_factory.mktemp("on-s3")
    for file in write_log(folder):
        storage.write_bytes(f"s3://{BUCKET}/raw/{file.name}", file.read_bytes())
        file.unlink()
    tracking = mlflow()
    settings = (f"workspace={WORKSPACE}", f"tracking.uri={tracking}", f"slate_store.url={valkey_server}")
    sets = tuple(part for setting in settings for part in ("--set", setting))
    raw = ("--logs", f"s3://{BUCKET}/raw/events.csv", "--items", f"s3://{BUCKET}/raw/items.csv")
    mapped = (*COLUMNS, "--set", "data.columns.item_id=sku")
    return OnS3(folder, settings, rankgr("quickstart", "--preset", "tiny", *raw, *mapped, *sets, folder=folder), tracking)


def test_it_ends_well_with_slates_fetched_over_http(on_s3: OnS3) -> None:
    assert on_s3.done.returncode == 0, on_s3.done.stderr[-3000:]
    assert "slates fetched over HTTP" in on_s3.done.stdout


def test_every_step_is_committed_in_the_bucket(on_s3: OnS3) -> None:
    manifests = [name for name in storage.list_files(f"{WORKSPACE}/steps", storage.MANIFEST) if name.count("/") == 2]
    assert sorted(name.split("/")[0] for name in manifests) == STEPS
    for name in manifests:
        storage.open_committed(f"{WORKSPACE}/steps/{name.removesuffix('/' + storage.MANIFEST)}")


def test_what_stays_on_the_machine_is_only_what_the_pipeline_engine_keeps(on_s3: OnS3) -> None:
    assert {path.relative_to(on_s3.folder).parts[:2] for path in on_s3.folder.rglob("*") if path.is_file()} <= {(".rankgr", "kfp")}


def test_mlflow_keeps_the_report_in_the_bucket_and_names_the_champion(on_s3: OnS3, tmp_path: Path) -> None:
    config = load_config(overrides=list(on_s3.settings))
    champion = Registry(config.tracking, config.workspace).champion()
    assert champion is not None
    assert champion.bundle_uri.startswith(f"{WORKSPACE}/steps/release/")
    client = MlflowClient(on_s3.tracking)
    run = client.get_model_version(config.tracking.model_name, champion.number).run_id
    report = Path(client.download_artifacts(run, "report.json", str(tmp_path)))
    assert f'"users": {champion.report["users"]}' in report.read_text()
    assert [name for name in storage.list_files(f"s3://{BUCKET}/mlflow") if name.endswith("report.json")]


def test_the_page_of_the_outcome_links_to_the_run_in_mlflow(on_s3: OnS3) -> None:
    (page,) = (on_s3.folder / ".rankgr/kfp").rglob("report-outcome/outcome")
    assert f"- MLflow: <{on_s3.tracking}/#/experiments/" in page.read_text()


def test_recommend_reads_the_bundle_from_the_bucket(on_s3: OnS3) -> None:
    sets = [part for setting in on_s3.settings for part in ("--set", setting)]
    done = rankgr_here("recommend", "u1", "-k", "4", *sets, folder=on_s3.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Thing number") == 4
