"""Models in a real MLflow database."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra import storage
from infra.errors import DataError, ServiceError
from infra.local import free_port
from infra.service_sections import TrackingConfig
from infra.tracking import CHAMPION, Registered, Registry

ORIGIN = {"run_id": "r1", "training": "s3://bucket/steps/training/1"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ws")


@pytest.fixture
def registry(workspace: Path, request: pytest.FixtureRequest) -> Registry:
    """A registry with a model of the test's own in one database."""
    return Registry(TrackingConfig(model_name=request.node.name, experiment=request.node.name), str(workspace))


def bundle(folder: Path, hr: float) -> str:
    storage.write_bytes(str(folder / "model.safetensors"), b"weights")
    storage.commit(str(folder), {"report": {"retriever": {"hr@10": hr}}})
    return str(folder)


def register(registry: Registry, uri: str, evaluation: str = "e1") -> str:
    return registry.register(
        uri,
        evaluation=evaluation,
        metrics={"retriever/hr@10": 0.25},
        params={"seed": "1", "config": "x" * 9000},
        files={"report.json": '{"a": 1}'},
        origin=ORIGIN,
    )


def test_nothing_is_champion_of_an_empty_registry(registry: Registry) -> None:
    assert registry.champion() is None


def test_a_registered_model_is_no_champion_before_it_is_promoted(registry: Registry, tmp_path: Path) -> None:
    assert register(registry, bundle(tmp_path / "b", 0.3)) == "1"
    assert registry.champion() is None


def test_the_champion_comes_with_its_bundle_evaluation_report_and_origin(registry: Registry, tmp_path: Path) -> None:
    uri = bundle(tmp_path / "b", 0.3)
    registry.promote(register(registry, uri, "e7"))
    assert registry.champion() == Registered("1", uri, "e7", {"retriever": {"hr@10": 0.3}}, ORIGIN)


def test_what_needs_a_champion_is_told_where_none_was_found(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no champion yet") as caught:
        registry.require_champion()
    assert caught.value.where == registry.uri
    registry.promote(register(registry, bundle(tmp_path / "b", 0.3)))
    assert registry.require_champion() == registry.champion()


def test_the_address_where_no_champion_was_found_is_shown_without_its_password(registry: Registry) -> None:
    registry.uri = "https://ann:secret@mlflow.example:5000/team/"
    with pytest.raises(DataError, match="there is no champion yet") as caught:
        registry.require_champion()
    assert "mlflow.example:5000" in caught.value.where
    assert "secret" not in caught.value.where


def test_an_alias_that_was_set_on_a_version_of_somebody_elses_is_refused(registry: Registry) -> None:
    name = registry.config.model_name
    registry.client.create_registered_model(name)
    registry.client.create_model_version(name, source="/elsewhere")
    registry.client.set_registered_model_alias(name, CHAMPION, "1")
    with pytest.raises(DataError, match="the champion, version 1, names no bundle"):
        registry.require_champion()


def test_promoting_moves_the_alias(registry: Registry, tmp_path: Path) -> None:
    for name, hr in (("one", 0.1), ("two", 0.2)):
        registry.promote(register(registry, bundle(tmp_path / name, hr)))
    champion = registry.champion()
    assert champion is not None
    assert (champion.number, champion.report) == ("2", {"retriever": {"hr@10": 0.2}})


def test_a_champion_whose_bundle_is_gone_has_no_report(registry: Registry, tmp_path: Path) -> None:
    uri = bundle(tmp_path / "b", 0.3)
    registry.promote(register(registry, uri))
    storage.remove(uri)
    champion = registry.champion()
    assert champion is not None
    assert champion.report == {}


def test_a_run_holds_figures_parameters_and_files(registry: Registry, tmp_path: Path) -> None:
    number = register(registry, bundle(tmp_path / "b", 0.3))
    client = MlflowClient(registry.uri)
    run = client.get_run(client.get_model_version(registry.config.model_name, number).run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"retriever/hr_at_10": 0.25}
    assert run.data.params["seed"] == "1"
    assert {key: value for key, value in run.data.tags.items() if key.startswith("rankgr.")} == {
        "rankgr.run_id": "r1",
        "rankgr.training": "s3://bucket/steps/training/1",
    }
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.json"]


def test_the_page_of_a_run_is_named_without_the_password_of_the_server(registry: Registry, tmp_path: Path) -> None:
    number = register(registry, bundle(tmp_path / "b", 0.3))
    assert registry.page_of(number) == ""
    registry.uri = "https://ann:secret@mlflow.example:5000/team/"
    run = registry.client.get_run(registry.run_of(number)).info
    assert registry.page_of(number) == f"https://mlflow.example:5000/team/#/experiments/{run.experiment_id}/runs/{run.run_id}"


def test_a_server_that_does_not_answer_is_a_service_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServiceError, match="MLflow cannot be reached") as caught:
        Registry(TrackingConfig(uri=address), str(tmp_path))
    assert caught.value.where == address
    assert "tracking.uri" in caught.value.mend


def test_what_a_server_is_entered_with_is_in_no_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ServiceError, match="MLflow cannot be reached") as caught:
        Registry(TrackingConfig(uri=f"http://ann:hidden@{address}"), str(tmp_path))
    assert "hidden" not in str(caught.value)
    assert caught.value.where == f"http://{address}"


def test_a_server_that_goes_away_is_not_taken_for_one_without_a_champion(monkeypatch: pytest.MonkeyPatch, registry: Registry) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    gone = f"http://127.0.0.1:{free_port()}"
    registry.client = MlflowClient(gone, gone)
    with pytest.raises(ServiceError, match="MLflow cannot be reached"):
        registry.champion()
