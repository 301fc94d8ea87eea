"""Every values file of the chart passes `helm lint --strict` and gives objects that every supported Kubernetes would take."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chart import schemas
from tests.chart.generate import CHART
from tests.chart.rendered import CI, EVERYTHING, NAMESPACE, Document, ci_values, crd_folder, label, one, pods, refusal, render, run_helm

VALUES = {"defaults": {}, "everything": EVERYTHING, **{name: ci_values(name) for name in CI}}
FOREIGN = ("ray.io/v1", "monitoring.coreos.com/v1")

everywhere = pytest.mark.parametrize("name", VALUES)


@everywhere
def test_lint_has_nothing_to_say(name: str) -> None:
    done = run_helm("lint", "--strict", str(CHART), values=VALUES[name])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout + done.stderr


@everywhere
@pytest.mark.parametrize("version", schemas.KUBERNETES)
def test_kubernetes_takes_every_object_and_knows_every_field(name: str, version: str) -> None:
    wrong = {}
    for document in render(VALUES[name]):
        if document["apiVersion"] not in FOREIGN:
            assert schemas.is_of_kubernetes(document, version), label(document)
            wrong[label(document)] = schemas.errors(document, version)
    assert {what: why for what, why in wrong.items() if why} == {}


@everywhere
def test_kuberay_takes_its_objects_and_knows_every_field(name: str) -> None:
    folder = crd_folder()
    if not folder.is_dir():
        pytest.skip(f"KubeRay's CRDs are not in {folder}: set RANKGR_CRDS to a folder with those of 1.7")
    documents = [document for document in render(VALUES[name]) if document["apiVersion"] == "ray.io/v1"]
    wrong = {label(document): schemas.crd_errors(document, folder) for document in documents}
    assert {what: why for what, why in wrong.items() if why} == {}


@everywhere
@pytest.mark.parametrize("version", [schemas.KUBERNETES[0], schemas.KUBERNETES[-1]])
def test_pods_inside_of_rays_resources_are_pods_of_kubernetes(name: str, version: str) -> None:
    """Checked without KubeRay's CRDs too."""
    ray = [document for document in render(VALUES[name]) if document["apiVersion"] == "ray.io/v1"]
    wrong = {}
    for what, labels, spec in pods(ray):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one", "labels": labels}, "spec": spec}
        wrong[what] = schemas.errors(pod, version)
    assert {what: why for what, why in wrong.items() if why} == {}


def test_a_field_that_kubernetes_does_not_know_is_seen() -> None:
    """The checks above would find it."""
    deployment = one(render(EVERYTHING), "Deployment", "-mlflow")
    misspelt = {**deployment, "spec": {**deployment["spec"], "replica": 1}}
    assert any("replica" in error for error in schemas.errors(misspelt, schemas.KUBERNETES[0]))
    folder = crd_folder()
    if folder.is_dir():
        cluster = one(render(EVERYTHING), "RayCluster")
        misspelt = {**cluster, "spec": {**cluster["spec"], "authOption": {"mode": "token"}}}
        assert any("authOption" in error for error in schemas.crd_errors(misspelt, folder))


@everywhere
def test_no_field_is_empty_by_mistake(name: str) -> None:
    assert [where for document in render(VALUES[name]) for where in nulls(document, label(document))] == []


def nulls(node: Any, where: str) -> list[str]:
    """Where a value is null, which Kubernetes takes for absent."""
    if node is None:
        return [where]
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in inner for found in nulls(value, f"{where}.{key}")]


@everywhere
def test_every_object_has_a_name_of_its_own_and_the_labels_of_the_release(name: str) -> None:
    documents = render(VALUES[name])
    names = [label(document) for document in documents]
    assert len(names) == len(set(names))
    for document in documents:
        assert document["metadata"]["labels"]["app.kubernetes.io/part-of"] == "rankgr"
        assert document["metadata"]["namespace"] == NAMESPACE


def test_the_longest_release_name_leaves_room_for_what_kuberay_appends() -> None:
    done = run_helm("template", "a" * 53, str(CHART), values=EVERYTHING)
    assert done.returncode == 0, done.stderr
    names = [line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("  name: a")]
    assert names and max(map(len, names)) <= 47


def test_the_notes_say_what_to_do_next() -> None:
    def notes(values: dict[str, Any]) -> str:
        return run_helm("install", "prod", str(CHART), "--dry-run=client", values=values).stdout.partition("NOTES:")[2]

    first = notes({})
    assert "create secret generic rankgr-ray --from-literal=auth_token=" in first
    assert "There is nothing to serve yet" in first and "rankgr run --config" in first
    later = notes(ci_values("small"))
    assert "curl localhost:8000/v1/users/1/slate" in later and "There is nothing to serve yet" not in later
    assert "WARNING" not in later
    assert "nothing uses them" in notes({"training": {"gpuWorkers": {"enabled": True}}})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"redis": {"enabled": False}}, "redis.external.url"),
        ({"mlflow": {"enabled": False}}, "mlflow.external.uri"),
        ({"config": {"workspace": "/here"}}, "workspaceVolume.enabled"),
        ({"serving": {"bundle": "s3://b", "workers": {"min": 9}}}, "serving.workers.max"),
        ({"redis": {"enabled": False, "external": {"url": "redis://r:1/0"}}, "serving": {"bundle": "s3://b"}}, "gcsFaultTolerance.address"),
    ],
)
def test_values_that_do_not_fit_together_are_refused_with_the_way_out(values: dict[str, Any], reason: str) -> None:
    assert reason in refusal(values)


def test_nothing_serves_or_streams_before_there_is_a_bundle() -> None:
    documents = render({"stream": {"enabled": True}})
    assert not [document for document in documents if document["kind"] == "RayService"]
    assert not [document for document in documents if document["metadata"]["name"].endswith("-stream") and document["kind"] == "Deployment"]


def test_a_gpu_preset_asks_for_the_gpu_and_the_nodes_that_have_it() -> None:
    cluster = one(render(ci_values("production")), "RayCluster")
    group = next(group for group in cluster["spec"]["workerGroupSpecs"] if group["groupName"] == "gpu")
    spec = group["template"]["spec"]
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]


def test_a_digest_goes_before_a_tag() -> None:
    documents: list[Document] = render(ci_values("production"))
    images = {container["image"] for _, _, spec in pods(documents) for container in spec["containers"]}
    assert f"images.example.com/rankgr/serve@sha256:{'2' * 64}" in images
