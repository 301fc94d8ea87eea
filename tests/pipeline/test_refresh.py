"""The pipeline on newer logs: the champion's SIDs stay, new items join, training goes on; and a gate that refuses ends it in order."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from infra import storage
from infra.config import load_config
from infra.steps import latest_run
from infra.tracking import Registry
from tests.command import Finished, rankgr
from tests.logs import SETTINGS, START_S

NEW = "sku-new"


@pytest.fixture
def folder(finished: Finished, tmp_path: Path) -> Path:
    """The finished workspace, for a test to change: with a registry of its own, whose champion lies in the first one."""
    for name in (".rankgr", "events.csv", "items.csv"):
        source = finished.folder / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("valkey", "kfp"))
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def options(folder: Path) -> list[str]:
    return ["--preset", "tiny", "--logs", str(folder / "events.csv"), "--items", str(folder / "items.csv"), *SETTINGS]


def codes(uri: str) -> dict[str, list[int]]:
    table = storage.read_table(storage.join(uri, "sids.parquet"))
    return dict(zip(table["item_id"].to_pylist(), table["codes"].to_pylist(), strict=True))


def test_a_refresh_keeps_the_sids_lets_new_items_join_and_starts_from_the_champion(folder: Path) -> None:
    config = load_config(overrides=[f"workspace={folder / '.rankgr'}"])
    registry = Registry(config.tracking, config.workspace)
    before = registry.champion()
    assert before is not None
    with (folder / "events.csv").open("a") as log:
        log.writelines(
            f"u{user},{item},{START_S + 900_000 + user * 10 + n},3\n" for user in range(20) for n, item in enumerate(("sku-01", NEW))
        )
    with (folder / "items.csv").open("a") as items:
        items.write(f"{NEW},Thing number 100,shelf 1\n")
    done = rankgr("refresh", *options(folder), folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    _, after = latest_run(str(folder / ".rankgr"))
    old, new = codes(before.bundle_uri), codes(after["semantic_ids"].uri)
    assert {item: new[item] for item in old} == old
    assert new[NEW] not in old.values()
    champion = registry.champion()
    assert champion is not None
    assert champion.bundle_uri == storage.join(after["release"].uri, "bundle")
    settings = storage.read_json(storage.join(champion.bundle_uri, "config.json"))
    assert settings["training"]["start_from"] == before.bundle_uri
    assert after["precompute"].metadata["version"] == after["release"].metadata["version"]


def test_a_refresh_without_new_events_trains_nothing_and_finishes_what_was_left_undone(folder: Path, finished: Finished) -> None:
    workspace = str(folder / ".rankgr")
    # The logs are the finished run's own: a copy would have other times, and be other logs.
    logs = ["--logs", str(finished.folder / "events.csv"), "--items", str(finished.folder / "items.csv")]
    done = rankgr("refresh", "--preset", "tiny", *logs, *SETTINGS, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    _, after = latest_run(workspace)
    assert "nothing is trained again" in done.stderr
    skipped = {name for name, step in after.items() if step.skipped}
    assert {"sessions", "semantic_ids", "training", "evaluation"} <= skipped
    assert not after["precompute"].skipped  # the slates of the copied workspace are in no Redis yet


def test_a_gate_that_refuses_ends_the_run_as_not_promoted_with_its_reasons(folder: Path) -> None:
    done = rankgr("run", *options(folder), "--set", "gate.min_gain_over_baselines=9", folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "gate: NOT promoted" in done.stdout
    assert "outcome=not promoted" in done.stderr.replace("'", "")
    (page,) = (folder / ".rankgr/kfp").rglob("report-outcome/outcome")
    assert page.read_text().startswith("# not promoted\n\n- ")
