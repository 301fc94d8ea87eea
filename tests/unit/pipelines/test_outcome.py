"""The first and the last step of a pipeline run: errors that are told are those of this attempt."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.config import Config, load_config
from infra.errors import DataError, ServiceError
from infra.steps import Run, keep_error, raise_kept_error
from pipelines.component import validate_parameters
from pipelines.outcome import outcome_of
from tests.logs import SETTINGS, write_log


@pytest.fixture
def config(tmp_path: Path) -> Config:
    events, items = write_log(tmp_path)
    overrides = [f"data.logs={events}", f"data.items={items}", f"workspace={tmp_path / 'ws'}"]
    return load_config(preset="tiny", overrides=[*overrides, *(text for text in SETTINGS if text != "--set")])


def validate(config: Config, run_id: str) -> None:
    """The step that a run begins with."""
    given = {"preset": "", "logs_uri": "", "items_uri": "", "overrides": []}
    validate_parameters.python_func(**given, config=config.to_json(), run_id=run_id, job_id="", refresh=False)


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
