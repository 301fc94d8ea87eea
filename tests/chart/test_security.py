"""Every pod, those inside Ray's resources too, fits the restricted Pod Security Standard and gets no more rights than it needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chart.generate import CHART
from tests.chart.rendered import CI, EVERYTHING, Document, ci_values, matches, pods, render

ALL = [EVERYTHING, *map(ci_values, CI)]
SECRET_WORDS = re.compile(r"password|token|secret|access.?key", re.IGNORECASE)

everywhere = pytest.mark.parametrize("values", ALL, ids=["everything", *CI])


def containers(documents: list[Document]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Every container: its name, itself, its pod's spec; Ray's autoscaler among them, which KubeRay adds."""
    for name, _, spec in pods(documents):
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            yield f"{name} {container['name']}", container, spec
    for document in documents:
        cluster = document["spec"].get("rayClusterConfig", document["spec"]) if document["apiVersion"] == "ray.io/v1" else {}
        if cluster.get("enableInTreeAutoscaling"):
            yield f"{document['metadata']['name']} autoscaler", cluster["autoscalerOptions"], cluster["headGroupSpec"]["template"]["spec"]


@everywhere
def test_no_pod_is_overlooked(values: dict[str, Any]) -> None:
    documents = render(values)
    parts = {labels["app.kubernetes.io/component"] for _, labels, _ in pods(documents)}
    assert {"test"} < parts
    assert len(list(pods(documents))) == sum(str(document).count("'containers':") for document in documents)


@everywhere
def test_pods_run_as_nobody_special_in_the_default_seccomp_profile(values: dict[str, Any]) -> None:
    for name, _, spec in pods(render(values)):
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert min(security["runAsUser"], security["runAsGroup"], security["fsGroup"]) > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name


@everywhere
def test_containers_drop_every_capability_and_write_to_volumes_alone(values: dict[str, Any]) -> None:
    for name, container, _ in containers(render(values)):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False, name
        assert security["privileged"] is False, name
        assert security["runAsNonRoot"] is True, name
        assert security["readOnlyRootFilesystem"] is True, name
        assert security["capabilities"] == {"drop": ["ALL"]}, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name


@everywhere
def test_volumes_are_of_kinds_that_the_restricted_standard_allows(values: dict[str, Any]) -> None:
    for name, _, spec in pods(render(values)):
        kinds = {kind for volume in spec.get("volumes", []) for kind in volume if kind != "name"}
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}, name


@everywhere
def test_every_mount_has_a_volume_and_every_volume_a_mount(values: dict[str, Any]) -> None:
    for name, container, spec in containers(render(values)):
        there = {volume["name"] for volume in spec["volumes"]} | {claim for claim in ("data",) if "StatefulSet" in name}
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted <= there, name
        if not name.endswith("autoscaler"):
            assert there <= mounted, name


@everywhere
def test_what_needs_to_be_written_can_be(values: dict[str, Any]) -> None:
    for name, container, _ in containers(render(values)):
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert writable & {"/tmp", "/data"}, name  # noqa: S108 - of containers
        if "ray" in container.get("name", "autoscaler"):
            assert "/tmp/ray" in writable, name  # noqa: S108


@everywhere
def test_every_container_says_what_it_needs_and_how_much_it_may_have(values: dict[str, Any]) -> None:
    for name, container, _ in containers(render(values)):
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= container["resources"][kind].keys(), name


@everywhere
def test_only_the_heads_of_ray_may_ask_the_kubernetes_api(values: dict[str, Any]) -> None:
    documents = render(values)
    for name, labels, spec in pods(documents):
        assert spec["automountServiceAccountToken"] is (labels.get("rankgr/node") == "head"), name
        assert spec["enableServiceLinks"] is False, name
    accounts = {one["metadata"]["name"]: one for one in documents if one["kind"] == "ServiceAccount"}
    assert {spec["serviceAccountName"] for _, _, spec in pods(documents)} == set(accounts)
    assert all(account["automountServiceAccountToken"] is False for account in accounts.values())
    assert not [one for one in documents if one["kind"] in ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")]


@everywhere
def test_ray_asks_for_a_token(values: dict[str, Any]) -> None:
    clusters = [one["spec"].get("rayClusterConfig", one["spec"]) for one in render(values) if one["apiVersion"] == "ray.io/v1"]
    assert clusters
    for cluster in clusters:
        assert cluster["authOptions"] == {"mode": "token", "secretName": "rankgr-ray"}
        assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)


@everywhere
def test_secrets_are_named_and_never_made_or_written_out(values: dict[str, Any]) -> None:
    documents = render(values)
    assert not [one for one in documents if one["kind"] == "Secret"]
    for name, container, _ in containers(documents):
        for variable in container.get("env", []):
            if SECRET_WORDS.search(variable["name"]):
                is_reference = "secretKeyRef" in variable.get("valueFrom", {})
                assert is_reference or variable["value"].startswith("/"), f"{name} {variable['name']}"


def test_no_default_is_a_password() -> None:
    text = (CHART / "values.yaml").read_text("utf-8")
    held = re.findall(r"(?im)^ *[a-z]*(?:password|token)[a-z]*: *(\S.*)$", text)
    assert set(held) <= {"password", "ray-password", "token", "[token]"}, "names of keys, no more"


@everywhere
def test_no_environment_variable_is_set_twice(values: dict[str, Any]) -> None:
    for name, container, _ in containers(render(values)):
        names = [variable["name"] for variable in container.get("env", [])]
        assert len(names) == len(set(names)), name


@everywhere
def test_budgets_find_pods_and_leave_evictions_possible(values: dict[str, Any]) -> None:
    documents = render(values)
    carried = [labels for _, labels, _ in pods(documents)]
    for budget in (one for one in documents if one["kind"] == "PodDisruptionBudget"):
        spec = budget["spec"]
        assert isinstance(spec["minAvailable"], int) and "maxUnavailable" not in spec, "all that works for pods of an operator"
        assert any(matches(spec["selector"]["matchLabels"], labels) for labels in carried), budget["metadata"]["name"]
    if values.get("podDisruptionBudgets", {}).get("enabled", True):
        workers = next(one for one in documents if one["metadata"]["name"].endswith("-serving-workers"))
        service = next(one for one in documents if one["kind"] == "RayService")
        group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
        assert workers["spec"]["minAvailable"] < group["minReplicas"]
