"""How a command that is interrupted ends."""

from __future__ import annotations

import pytest

from pipelines.local_run import interruptible


def test_ctrl_c_ends_with_its_own_status_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, interruptible():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert "run the same command again" in capsys.readouterr().err


def test_an_error_while_stopping_changes_nothing_about_that(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted_work() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise OSError("the actor is gone")

    with pytest.raises(SystemExit) as ended, interruptible():
        interrupted_work()
    assert ended.value.code == 130
    assert "the actor is gone" in capsys.readouterr().err


def test_other_errors_pass() -> None:
    with pytest.raises(OSError, match="disk full"), interruptible():
        raise OSError("disk full")
