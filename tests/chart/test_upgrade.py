"""`helm upgrade`: values of an earlier version still render, and what Kubernetes never lets change has not changed.

`tests/chart/previous/VERSION.json` is what `python -m tests.chart.record` wrote when that version was made.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chart.record import PREVIOUS, immutable
from tests.chart.rendered import CI, ci_values, label, one, render

EARLIER = [(file, name) for file in sorted(PREVIOUS.glob("*.json")) for name in json.loads(file.read_text("utf-8"))]


@pytest.mark.parametrize(("file", "name"), EARLIER, ids=[f"{file.stem} {name}" for file, name in EARLIER])
def test_a_release_of_an_earlier_version_can_be_upgraded(file: Path, name: str) -> None:
    kept = json.loads(file.read_text("utf-8"))[name]
    now = immutable(render(kept["values"], "--is-upgrade"))
    assert {what: now.get(what) for what in kept["immutable"]} == kept["immutable"]


@pytest.mark.parametrize("name", CI)
def test_another_bundle_leaves_the_running_clusters_as_they_are(name: str) -> None:
    """So that Ray Serve rolls it out inside, and KubeRay makes no other cluster."""
    values = ci_values(name)
    before, after = (render({**values, "serving": {**values["serving"], "bundle": bundle}}) for bundle in ("s3://b/one", "s3://b/two"))
    clusters = [one(documents, "RayService")["spec"]["rayClusterConfig"] for documents in (before, after)]
    assert clusters[0] == clusters[1]
    assert one(before, "RayService")["spec"]["serveConfigV2"] != one(after, "RayService")["spec"]["serveConfigV2"]
    assert [label(left) for left, right in zip(before, after, strict=True) if left != right] == ["RayService/prod-rankgr-serving"]
