"""What a KFP component does around its step: settings in, errors out."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.config import Config, load_config
from infra.errors import ConfigError, DataError, IntegrityError
from infra.kfp_run import step_process
from infra.steps import Run, forget_errors, raise_kept_error


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(preset="tiny", overrides=[f"workspace={tmp_path / 'ws'}"])


def fail(config: Config, error: Exception, step: str = "training") -> SystemExit:
    with pytest.raises(SystemExit) as ended, step_process(step, config.to_json(), "r1", fresh=False):
        raise error
    return ended.value


def start(config: Config, step: str) -> None:
    """The step once more, which now ends well."""
    with step_process(step, config.to_json(), "r1", fresh=False):
        pass


def test_a_step_gets_the_run_of_its_parameters(config: Config) -> None:
    with step_process("training", config.to_json(), "r1", fresh=True) as run:
        assert (run.config, run.run_id, run.fresh) == (config, "r1", True)
    raise_kept_error(config.workspace, "r1")


def test_an_error_ends_the_step_with_its_exit_code_and_is_raised_again_as_what_it_was(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(config, DataError("broken", where="log.csv", mend="repair it")).code == 3
    assert "broken" in capsys.readouterr().err
    with pytest.raises(DataError) as caught:
        raise_kept_error(config.workspace, "r1")
    assert str(caught.value) == "broken\n  where: log.csv\n  mend:  repair it"
    raise_kept_error(config.workspace, "another run")


def test_a_later_attempt_of_the_run_forgets_the_error(config: Config) -> None:
    fail(config, IntegrityError("damaged"))
    with pytest.raises(IntegrityError):
        raise_kept_error(config.workspace, "r1")
    start(config, "training")
    assert raise_kept_error(config.workspace, "r1") is None


def test_the_first_of_several_errors_is_raised_with_a_note_of_the_others(config: Config) -> None:
    fail(config, DataError("the log is empty", where="log.csv", mend="look at it"), "reward")
    fail(config, IntegrityError("damaged", where="model.safetensors"), "training")
    with pytest.raises(DataError) as caught:
        raise_kept_error(config.workspace, "r1")
    note = "  also:  training failed too: damaged"
    assert str(caught.value) == f"the log is empty\n  where: log.csv\n  mend:  look at it\n{note}"


def test_of_a_named_step_only_its_own_error_is_raised(config: Config) -> None:
    fail(config, DataError("the log is empty"), "reward")
    raise_kept_error(config.workspace, "r1", "training")
    with pytest.raises(DataError, match="the log is empty"):
        raise_kept_error(config.workspace, "r1", "reward")


def test_a_step_that_starts_forgets_its_own_error_and_no_other(config: Config) -> None:
    for step in ("reward", "training"):
        fail(config, DataError(f"{step} is broken"), step)
    start(config, "reward")
    with pytest.raises(DataError, match=r"^training is broken$"):
        raise_kept_error(config.workspace, "r1")


def test_a_new_attempt_of_the_run_forgets_the_errors_of_all_steps(config: Config) -> None:
    for step in ("reward", "training"):
        fail(config, DataError(f"{step} is broken"), step)
    forget_errors(Run(config, "another run"))
    with pytest.raises(DataError):
        raise_kept_error(config.workspace, "r1")
    forget_errors(Run(config, "r1"))
    raise_kept_error(config.workspace, "r1")


def test_a_full_disk_does_not_hide_the_error(config: Config, tmp_path: Path) -> None:
    (tmp_path / "ws").write_text("a file where the workspace should be")
    assert fail(config, DataError("broken")).code == 3


def test_an_error_of_nobody_gets_through(config: Config) -> None:
    with pytest.raises(ZeroDivisionError), step_process("training", config.to_json(), "r1", fresh=False):
        raise ZeroDivisionError


def test_settings_that_the_schema_refuses_end_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, step_process("training", '{"sed": 1}', "r1", fresh=False):
        pass
    assert ended.value.code == ConfigError.exit_code
    assert "did you mean 'seed'?" in capsys.readouterr().err
