"""`rankgr sids`: figures and report of a SID table, items that join the champion, a plan."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from infra import storage
from infra.config import load_config
from infra.tracking import Registry
from tests.command import Finished, rankgr, rankgr_here
from tests.logs import SETTINGS


@pytest.fixture
def workspace(finished: Finished, tmp_path: Path) -> Path:
    """A folder with a copy of the finished run, whose champion may change."""
    shutil.copytree(finished.folder / ".rankgr", tmp_path / ".rankgr")
    return tmp_path


def latest(folder: Path) -> str:
    return str(storage.read_json(str(folder / ".rankgr/runs/latest.json"))["run_id"])


def new_items(folder: Path, *rows: str) -> str:
    path = folder / "new.csv"
    path.write_text("\n".join(["sku,title,category", *rows]) + "\n")
    return str(path)


def test_the_figures_of_a_finished_table_are_shown_with_its_report(finished: Finished) -> None:
    shown = rankgr("sids", *finished.arguments[1:7], *SETTINGS, folder=finished.folder)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert "40 items, balanced_rq_kmeans" in shown.stdout
    assert "utilisation" in shown.stdout
    page = re.search(r"report: (\S+)", shown.stdout)
    assert page is not None
    assert "Thing number" in storage.read_bytes(page.group(1)).decode()


def test_new_items_join_the_champion_and_slates_are_computed_with_them(workspace: Path) -> None:
    added = rankgr("sids", "add", "--items", new_items(workspace, "new-1,A thing,shelf 1", "sku-01,Known,shelf 0"), folder=workspace)
    assert added.returncode == 0, added.stderr[-2000:]
    assert "1 items added, 1 were known" in added.stdout
    folder = added.stdout.strip().splitlines()[-1]
    sids = storage.read_table(f"{folder}/bundle/sids.parquet").to_pylist()
    assert [row["item_id"] for row in sids[-1:]] == ["new-1"]
    assert len({tuple(row["codes"]) for row in sids}) == len(sids) == 41
    published = rankgr("precompute", "--preset", "tiny", folder=workspace)
    assert published.returncode == 0, published.stderr[-2000:]
    assert f"version {storage.open_committed(folder, verify=False).metadata['version']}" in published.stdout
    slates = rankgr_here("recommend", "u1", "-k", "41", "--preset", "tiny", "--set", "decoding.exclude_seen=false", folder=workspace)
    assert "new-1" in slates.stdout, slates.stdout + slates.stderr[-2000:]


def test_precompute_after_a_rollback_is_for_the_version_rolled_back_to(workspace: Path) -> None:
    registry = Registry(load_config(preset="tiny").tracking, str(workspace / ".rankgr"))
    before = registry.require_champion()
    added = rankgr_here("sids", "add", "--items", new_items(workspace, "new-1,A thing,shelf 1"), folder=workspace)
    assert added.returncode == 0, added.stderr[-2000:]
    assert registry.require_champion().origin == before.origin
    registry.promote(before.number)  # what `rankgr release rollback` does to the registry
    planned = rankgr_here("precompute", "--dry-run", folder=workspace)
    version = storage.open_committed(before.bundle_uri, verify=False).digest[:12]
    assert f"publish the slates of {version} for the users of run {before.origin['run_id']}" in planned.stdout + planned.stderr


def test_the_same_run_once_more_keeps_what_was_added(workspace: Path, finished: Finished) -> None:
    add = ("sids", "add", "--items", new_items(workspace, "new-1,A thing,shelf 1"))
    grown = rankgr_here(*add, folder=workspace).stdout.strip().splitlines()[-1]
    again = rankgr("run", *finished.arguments[1:7], *SETTINGS, folder=workspace)
    assert again.returncode == 0, again.stderr[-2000:]
    (record,) = (workspace / ".rankgr/runs").glob(f"{latest(workspace)}/release.step.json")
    assert storage.read_json(str(record))["uri"] == grown
    assert "nothing new" in rankgr_here(*add, folder=workspace).stdout


def test_precompute_without_the_timelines_that_the_champion_came_from_says_so(workspace: Path) -> None:
    registry = Registry(load_config(preset="tiny").tracking, str(workspace / ".rankgr"))
    uri = registry.require_champion().bundle_uri
    registry.promote(registry.register(uri, evaluation="", metrics={}, params={}, files={}))
    refused = rankgr_here("precompute", folder=workspace)
    assert refused.returncode == 3
    assert "the timelines that the champion came from are not known" in refused.stderr


def test_options_before_the_subcommand_are_refused(tmp_path: Path) -> None:
    shown = rankgr_here("sids", "--preset", "tiny", "plan", "--count", "10", folder=tmp_path)
    assert shown.returncode == 2
    assert "options stand before the subcommand" in shown.stderr


def test_items_that_are_all_known_change_nothing(workspace: Path) -> None:
    added = rankgr_here("sids", "add", "--items", new_items(workspace, "sku-01,Known,shelf 0"), folder=workspace)
    assert added.returncode == 0
    assert "nothing new: the champion has all 1 items" in added.stdout


def test_a_new_item_given_twice_is_left_out_with_its_reason(workspace: Path) -> None:
    rows = ("new-1,A thing,shelf 1", "new-1,Another,shelf 2")
    added = rankgr_here("sids", "add", "--items", new_items(workspace, *rows), folder=workspace)
    assert added.returncode == 0, added.stderr[-2000:]
    assert "left out, the item id occurs twice" in added.stderr


def test_a_plan_says_passes_and_memory(tmp_path: Path) -> None:
    shown = rankgr_here("sids", "plan", "--count", "10000000", "--dims", "64", "--set", "semantic_ids.workers=4", folder=tmp_path)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert "10,000,000 items x 64 dimensions" in shown.stdout
    assert re.search(r"passes over the items\s*│\s*54", shown.stdout)
