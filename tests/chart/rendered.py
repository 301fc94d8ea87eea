"""The chart as Helm renders it, and what is in it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.generate import CHART
from tests.chart.tools import helm

CI = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
RELEASE, NAMESPACE = "prod", "models"
EVERYTHING = {
    "serving": {"bundle": "s3://bucket/bundle", "ingress": {"enabled": True}},
    "training": {"gpuWorkers": {"enabled": True}},
    "stream": {"enabled": True},
    "refresh": {"enabled": True},
    "pipelines": {"upload": {"enabled": True}},
    "podDisruptionBudgets": {"blockSingletons": True},
    "monitoring": {name: {"enabled": True} for name in ("serviceMonitors", "rules", "dashboards")},
}
"""Values with which every object is there."""

Document = dict[str, Any]
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the fast one, where libyaml is there


def documents_of(text: str) -> list[Document]:
    """The documents of a YAML text."""
    return [document for document in yaml.load_all(text, _LOADER) if document]


def ci_values(name: str) -> dict[str, Any]:
    """One of the chart's values files."""
    return dict(documents_of((CHART / "ci" / f"{name}-values.yaml").read_text("utf-8"))[0])


def run_helm(*arguments: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """What Helm says, in the form of a finished process."""
    program = helm()
    if program is None:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail("helm is not installed: make chart")
        pytest.skip("helm is not installed: make chart")
    given = ["--values", "-"] if values is not None else []
    return subprocess.run([program, *arguments, *given], input=json.dumps(values or {}), capture_output=True, text=True, check=False)


@cache
def _rendered(values: str, options: tuple[str, ...]) -> str:
    done = run_helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, *options, values=json.loads(values))
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(values: dict[str, Any], *options: str) -> list[Document]:
    """All objects of the release."""
    text = _rendered(json.dumps(values, sort_keys=True), options)
    return documents_of(text)


def refusal(values: dict[str, Any]) -> str:
    """Why Helm renders nothing with these values."""
    done = run_helm("template", RELEASE, str(CHART), values=values)
    assert done.returncode != 0, "it rendered"
    return done.stderr


def one(documents: list[Document], kind: str, name: str = "") -> Document:
    """The object of this kind whose name ends so."""
    found = [one for one in documents if one["kind"] == kind and one["metadata"]["name"].endswith(name)]
    assert len(found) == 1, [f"{one['kind']}/{one['metadata']['name']}" for one in documents]
    return found[0]


def label(document: Document) -> str:
    """How an object is called in messages."""
    return f"{document['kind']}/{document['metadata']['name']}"


def pods(documents: list[Document]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Every pod that comes of the objects: its name, labels and spec, those inside Ray's resources among them."""
    for document in documents:
        yield from _pods_below(document, label(document))


def _pods_below(node: Any, name: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    if isinstance(node, dict):
        if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
            yield name, node.get("metadata", {}).get("labels", {}), node["spec"]
            return
        for key, inner in node.items():
            part = inner.get("groupName", "") if isinstance(inner, dict) else ""
            yield from _pods_below(inner, f"{name} {part or key}" if "Group" in key else name)
    elif isinstance(node, list):
        for inner in node:
            yield from _pods_below(inner, f"{name} {inner['groupName']}" if isinstance(inner, dict) and "groupName" in inner else name)


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Whether a selector of labels finds what carries these."""
    return selector.items() <= labels.items()


def crd_folder() -> Path:
    """Where KubeRay's CRDs may be, which are not part of the project: RANKGR_CRDS, by default `../shared/k8s/crds` beside the checkout."""
    return Path(os.environ.get("RANKGR_CRDS") or CHART.parents[2] / "shared" / "k8s" / "crds")
