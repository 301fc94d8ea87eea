"""Who reaches whom, read from the policies as Kubernetes adds them up."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chart.rendered import CI, EVERYTHING, NAMESPACE, Document, ci_values, matches, pods, render

OPERATOR, PROMETHEUS, STRANGER = "kuberay-system", "monitoring", "somebody"
Pod = tuple[str, dict[str, str]]

everywhere = pytest.mark.parametrize("values", [EVERYTHING, *map(ci_values, CI)], ids=["everything", *CI])


def policies(documents: list[Document], pod: Pod, direction: str) -> list[dict[str, Any]]:
    """The policies that hold for a pod of the release in a direction."""
    held = [one["spec"] for one in documents if one["kind"] == "NetworkPolicy" and pod[0] == NAMESPACE]
    return [one for one in held if direction in one["policyTypes"] and matches(one["podSelector"]["matchLabels"], pod[1])]


def admits(documents: list[Document], pod: Pod, direction: str, other: Pod, port: int) -> bool:
    """Whether the pod's policies let traffic with another pod pass."""
    held = policies(documents, pod, direction)
    key, side = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    rules = [rule for one in held for rule in one.get(key, [])]
    return not held or any(
        any(is_peer(peer, other) for peer in rule[side]) and port in [one["port"] for one in rule.get("ports", [{"port": port}])]
        for rule in rules
    )


def is_peer(peer: dict[str, Any], pod: Pod) -> bool:
    if "ipBlock" in peer:
        return False  # of addresses outside
    names = {"kubernetes.io/metadata.name": pod[0]}
    in_namespace = matches(peer["namespaceSelector"]["matchLabels"], names) if "namespaceSelector" in peer else pod[0] == NAMESPACE
    return in_namespace and matches(peer.get("podSelector", {}).get("matchLabels", {}), pod[1])


def reaches(documents: list[Document], start: Pod, end: Pod, port: int) -> bool:
    return admits(documents, start, "Egress", end, port) and admits(documents, end, "Ingress", start, port)


def ours(documents: list[Document]) -> dict[str, Pod]:
    """The release's pods by component, of Ray's clusters a head and a worker."""
    found = {}
    for _, labels, _ in pods(documents):
        node = labels.get("rankgr/node")
        found["-".join(filter(None, (labels["app.kubernetes.io/component"], node)))] = (NAMESPACE, labels)
    return found


@everywhere
def test_every_pod_is_closed_in_both_directions_but_for_what_is_named(values: dict[str, Any]) -> None:
    documents = render(values)
    for name, pod in ours(documents).items():
        assert policies(documents, pod, "Ingress") and policies(documents, pod, "Egress"), name


@everywhere
def test_a_stranger_reaches_nothing(values: dict[str, Any]) -> None:
    documents = render(values)
    ports = (53, 443, 5000, 6379, 8000, 8001, 8080, 8265, 10001, 52365)
    for stranger in ((STRANGER, {}), (NAMESPACE, {"app": "other"})):
        assert not [(name, port) for name, pod in ours(documents).items() for port in ports if reaches(documents, stranger, pod, port)]


def test_clients_reach_the_service_and_nothing_else() -> None:
    documents = render(ci_values("small"))
    shop = ("shop", {"app": "storefront"})
    reached = {(name, port) for name, pod in ours(documents).items() for port in range(5000, 11000) if reaches(documents, shop, pod, port)}
    assert reached == {("serving-head", 8000), ("serving-worker", 8000)}
    assert not reaches(documents, ("shop", {"app": "another"}), ours(documents)["serving-worker"], 8000)


def test_prometheus_and_the_operator_reach_what_they_ask() -> None:
    documents = render(EVERYTHING)
    there = ours(documents)
    asked = {name: [port for port in (8000, 8001, 8080, 8265) if reaches(documents, (PROMETHEUS, {}), there[name], port)] for name in there}
    assert {name: ports for name, ports in asked.items() if ports} == {
        "serving-head": [8080], "serving-worker": [8080], "training-head": [8080], "training-worker": [8080], "stream": [8001],
    }  # fmt: skip
    assert reaches(documents, (OPERATOR, {}), there["serving-head"], 8265) and reaches(
        documents, (OPERATOR, {}), there["training-head"], 8265
    )
    assert not reaches(documents, (OPERATOR, {}), there["redis"], 6379)


def test_prometheus_reaches_haproxys_own_figures_where_it_answers() -> None:
    for haproxy in (False, True):
        documents = render({**EVERYTHING, "serving": {**EVERYTHING["serving"], "haproxy": haproxy}})
        assert reaches(documents, (PROMETHEUS, {}), ours(documents)["serving-worker"], 9101) == haproxy


def test_parts_reach_what_they_work_with() -> None:
    documents = render(EVERYTHING)
    there = ours(documents)
    paths = """
        serving-worker serving-head 6379, serving-head serving-worker 10002, serving-worker redis 6379, serving-head redis 6379,
        training-worker training-head 6379, training-worker redis 6379, training-worker mlflow 5000, stream redis 6379, stream mlflow 5000,
        refresh training-head 8265, refresh redis 6379, refresh mlflow 5000, test serving-worker 8000, test redis 6379, test mlflow 5000"""
    closed = (
        "serving-worker mlflow 5000, serving-worker training-head 8265, redis mlflow 5000, upload redis 6379, stream training-head 8265"
    )
    for text, expected in ((paths, True), (closed, False)):
        for path in text.split(","):
            start, end, port = path.split()
            assert reaches(documents, there[start], there[end], int(port)) is expected, path


@everywhere
def test_all_find_names_and_only_heads_the_kubernetes_api(values: dict[str, Any]) -> None:
    documents = render(values)
    for name, pod in ours(documents).items():
        assert admits(documents, pod, "Egress", ("kube-system", {"k8s-app": "kube-dns"}), 53), name
        opened = {
            one["port"]
            for policy in policies(documents, pod, "Egress")
            for rule in policy.get("egress", [])
            if any("ipBlock" in peer for peer in rule["to"])
            for one in rule["ports"]
        }
        assert (6443 in opened or 443 in opened) if name.endswith("-head") else 6443 not in opened, name
    if values.get("redis", {}).get("enabled", True):
        [own] = [one for one in documents if one["kind"] == "NetworkPolicy" and one["metadata"]["name"].endswith("-redis")]
        assert "egress" not in own["spec"], "Redis calls nobody"
