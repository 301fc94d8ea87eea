"""Parameters of a pipeline run: layers, and everything that is wrong in one error."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.config import load_config
from infra.errors import ConfigError
from infra.local import free_port
from pipelines.parameters import refreshed, resolve
from tests.logs import SETTINGS, write_log


def test_each_layer_lies_over_the_one_before(tmp_path: Path) -> None:
    events, items = write_log(tmp_path)
    columns = [text for text in SETTINGS if text != "--set"]
    found = resolve(
        "tiny", str(events), str(items), [*columns, "training.epochs=9"], '{"seed": 4, "training": {"epochs": 8, "workers": 3}}', look=False
    )
    assert (found.training.epochs, found.training.workers, found.seed, found.retriever.layers) == (9, 3, 4, 1)
    assert (found.data.logs, found.data.items) == (str(events), str(items))


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("tny", "/nowhere/log.csv", "/nowhere/items.csv", ["epochs", "training.epochs=0", "sed=1"], "[]")
    problems = caught.value.what.splitlines()
    assert problems[0] == "7 of the parameters cannot be used:"
    for part in ("preset: unknown preset 'tny'", "config: not a JSON mapping", "overrides: cannot read 'epochs'", "training.epochs: "):
        assert any(part in problem for problem in problems), part
    assert any("did you mean 'seed'" in problem for problem in problems)
    assert [p for p in problems if "the path does not exist" in p] == [
        "  - logs_uri: the path does not exist (/nowhere/log.csv)",
        "  - items_uri: the path does not exist (/nowhere/items.csv)",
    ]


def test_what_is_wrong_with_the_logs_is_one_of_the_problems(tmp_path: Path) -> None:
    events, _ = write_log(tmp_path)
    with pytest.raises(ConfigError, match="missing columns: 'user_id'"):
        resolve("tiny", str(events), "", [], "")


def test_every_file_and_service_that_cannot_be_used_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/a.csv").write_text("who,what\n1,2\n")
    (tmp_path / "logs/b.csv").write_text("")
    (tmp_path / "items.csv").write_text("sku\n1\n")
    settings = ["workspace=s3://bucket/rankgr", f"slate_store.url=redis://127.0.0.1:{free_port()}/0"]
    with pytest.raises(ConfigError) as caught:
        resolve("tiny", str(tmp_path / "logs"), str(tmp_path / "items.csv"), settings, "")
    problems = caught.value.what.splitlines()
    assert problems[0] == "5 of the parameters cannot be used:"
    wanted = ["b.csv", "a.csv", "items.csv", "tracking.uri must be set", "Redis does not answer"]
    assert [[part in problem for part in wanted].index(True) for problem in problems[1:]] == [0, 1, 2, 3, 4], problems


@pytest.mark.parametrize(
    ("setting", "variable"),
    [
        ("slate_store.url=redis://:hidden@host:6379/0", "RANKGR_REDIS_URL"),
        ("slate_store.url=redis://host:6379/0?password=hidden", "RANKGR_REDIS_URL"),
        ("tracking.uri=https://me:hidden@mlflow", "MLFLOW_TRACKING_PASSWORD"),
    ],
)
def test_a_password_among_the_settings_is_refused_and_not_repeated(setting: str, variable: str) -> None:
    with pytest.raises(ConfigError, match=variable) as caught:
        resolve("tiny", "", "", [setting], "")
    assert "hidden" not in str(caught.value)


def test_of_ten_thousand_bad_files_the_first_twenty_are_named(tmp_path: Path) -> None:
    for number in range(25):
        (tmp_path / f"{number:02}.csv").write_text("who\n")
    with pytest.raises(ConfigError) as caught:
        resolve("tiny", str(tmp_path), "", [], "")
    lines = caught.value.what.splitlines()
    assert (len(lines), lines[-1]) == (22, "  and 6 more")  # the 26th problem: no Redis is named


def test_without_a_champion_there_is_nothing_to_refresh(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no champion to go on from"):
        refreshed(load_config(preset="tiny", overrides=[f"workspace={tmp_path}"]))
