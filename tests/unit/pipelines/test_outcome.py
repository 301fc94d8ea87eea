"""The first and the last step of a pipeline run: errors that are told are those of this attempt."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.config import Config, load_config
from infra.errors import DataError, ServiceError
from infra.local import free_port
from infra.service_sections import TrackingConfig
from infra.steps import Run, StepResult, keep_error, raise_kept_error, remember
from pipelines import outcome
from pipelines.component import validate_parameters
from pipelines.outcome import outcome_of
from tests.logs import SETTINGS, write_log


@pytest.fixture
def config(tmp_path: Path, valkey: str) -> Config:
    events, items = write_log(tmp_path)
    overrides = [f"data.logs={events}", f"data.items={items}", f"workspace={tmp_path / 'ws'}", f"slate_store.url={valkey}"]
    return load_config(preset="tiny", overrides=[*overrides, *(text for text in SETTINGS if text != "--set")])


def validate(config: Config, run_id: str) -> None:
    """The step that a run begins with."""
    given = {"preset": "", "logs_uri": "", "items_uri": "", "overrides": []}
    validate_parameters.python_func(**given, config=config.to_json(), run_id=run_id, job_id="", refresh=False, fresh=False)


def test_the_page_of_a_run_in_which_steps_failed_side_by_side_tells_the_first_error_and_names_the_others(config: Config) -> None:
    run = Run(config, "r1")
    keep_error(run, "reward", DataError("no positives", where="log.csv", mend="choose other objectives"))
    keep_error(run, "training", ServiceError("the cluster is gone", where="http://head"))
    headline, page = outcome_of(config, "r1", succeeded=False)
    assert headline == "failed: no positives"
    reasons = ["- log.csv", "- choose other objectives", "- training failed too: the cluster is gone"]
    assert page.splitlines() == ["# failed: no positives", "", *reasons]


def test_a_run_that_is_started_again_is_not_told_as_failed_by_an_error_of_its_first_attempt(config: Config) -> None:
    keep_error(Run(config, "r1"), "reward", DataError("no positives"))
    validate(config, "r1")
    headline, _ = outcome_of(config, "r1", succeeded=False)
    assert headline == "failed"


def test_parameters_that_are_refused_take_the_place_of_the_errors_of_an_earlier_attempt(config: Config, tmp_path: Path) -> None:
    keep_error(Run(config, "r1"), "reward", DataError("no positives"))
    (tmp_path / "events.csv").unlink()
    with pytest.raises(SystemExit):
        validate(config, "r1")
    with pytest.raises(Exception, match="the path does not exist") as caught:
        raise_kept_error(config.workspace, "r1")
    assert "no positives" not in str(caught.value)


def promoted(config: Config) -> tuple[str, str]:
    run = Run(config, "r1")
    remember(run, StepResult("gate", "/steps/gate/1", False, 1.0, {"promoted": True, "reasons": ["better"]}))
    remember(run, StepResult("release", "/steps/release/1", False, 2.0, {"version": "abc", "mlflow_version": "3"}))
    return outcome_of(config, "r1", succeeded=True)


def with_mlflow(config: Config, uri: str) -> Config:
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})


def test_the_page_of_a_promoted_run_links_to_its_run_in_mlflow(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Server:
        def __init__(self, tracking: TrackingConfig, workspace: str) -> None:
            self.uri = tracking.uri

        def page_of(self, number: str) -> str:
            return f"{self.uri}/run-of-{number}"

    monkeypatch.setattr(outcome, "Registry", Server)
    headline, page = promoted(with_mlflow(config, "http://mlflow:5000"))
    assert headline == "promoted: version abc, MLflow version 3"
    assert page.splitlines()[:4] == [f"# {headline}", "", "- better", "- MLflow: <http://mlflow:5000/run-of-3>"]


def test_a_run_is_told_as_promoted_whether_or_not_mlflow_answers_or_has_pages(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for uri in ("", f"http://127.0.0.1:{free_port()}"):
        headline, page = promoted(with_mlflow(config, uri))
        assert headline == "promoted: version abc, MLflow version 3"
        assert page.splitlines()[:4] == [f"# {headline}", "", "- better", ""]
