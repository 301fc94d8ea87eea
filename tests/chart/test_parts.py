"""The parts fit RankGR's own code: the file for Ray Serve, settings of trainer and refresh, metrics, alert rules, dashboards."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.config import Config, load_config
from serving.app import INGRESS
from serving.deploy import Target, serve_file
from tests.chart.generate import ROOT
from tests.chart.rendered import CI, EVERYTHING, ci_values, matches, one, pods, render
from tests.logs import SETTINGS, write_log

everywhere = pytest.mark.parametrize("values", [EVERYTHING, *map(ci_values, CI)], ids=["everything", *CI])


def serve_config(values: dict[str, Any]) -> dict[str, Any]:
    """What Ray Serve is told."""
    return dict(yaml.safe_load(one(render(values), "RayService")["spec"]["serveConfigV2"]))


def settings(values: dict[str, Any], folder: Path) -> Config:
    """Those of trainer, refresh and jobs, read as they read them."""
    file = folder / "run.yaml"
    file.write_text(one(render(values), "ConfigMap", "-settings")["data"]["run.yaml"], "utf-8")
    return load_config(str(file))


@everywhere
def test_ray_serve_is_told_what_the_command_would_write(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        monkeypatch.setenv(f"RANKGR_TOKEN_{number}", "a-token-of-the-tests-0123456789")
    ours = serve_config(values)
    [application] = ours["applications"]
    written = yaml.safe_load(serve_file(settings(values, tmp_path), application["args"]["bundle"]))
    [expected] = written["applications"]
    of_ours, of_written = (one.pop("args") for one in (application, expected))
    application.pop("deployments")
    assert ours == written
    assert of_ours["bundle"] == of_written["bundle"]
    sections = ("serving", "slate_store", "streaming")
    read = load_config(base=Target.model_validate(of_ours).settings)
    for section in sections:  # what is left out there has its default
        mine, theirs = getattr(read, section).model_dump(mode="json"), of_written["settings"][section]
        mine.pop("url", None)
        assert mine == theirs


@everywhere
def test_ray_knows_every_field_of_its_file_and_spreads_the_ingress_over_nodes(values: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    file = serve_config(values)
    ServeDeploySchema.model_validate(file)
    [ingress] = file["applications"][0]["deployments"]
    assert ingress["name"] == INGRESS
    workers = one(render(values), "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"]
    replicas = file["applications"][0]["args"]["settings"]["serving"]["retrieval_replicas"]
    needed = -(-replicas // ingress["max_replicas_per_node"])
    assert needed >= min(replicas, workers), "a proxy runs where a replica is"
    assert ingress["max_replicas_per_node"] * workers >= replicas, "they fit on the nodes that are always there"


@everywhere
def test_another_cluster_is_made_beside_the_one_that_serves(values: dict[str, Any]) -> None:
    spec = one(render(values), "RayService")["spec"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    assert spec["excludeHeadPodFromServeSvc"] is True
    assert spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_two_proxies_by_default() -> None:
    values = {"serving": {"bundle": "s3://bucket/bundle"}}
    file = serve_config(values)
    assert file["proxy_location"] == "EveryNode"
    assert file["applications"][0]["deployments"] == [{"name": "Ingress", "max_replicas_per_node": 1}]
    assert one(render(values), "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplicas"] == 2


def test_ray_is_the_one_that_rankgr_is_tested_with() -> None:
    for kind in ("RayService", "RayCluster"):
        spec = one(render(EVERYTHING), kind)["spec"]
        assert spec.get("rayClusterConfig", spec)["rayVersion"] == version("ray")


@everywhere
def test_settings_name_services_by_address_and_secrets_by_reference(values: dict[str, Any], tmp_path: Path) -> None:
    config, documents = settings(values, tmp_path), render(values)
    environment = {variable["name"] for _, _, spec in pods(documents) for one in spec["containers"] for variable in one.get("env", [])}
    for reference in (config.slate_store.username, config.slate_store.password):
        assert reference.removeprefix("env:") in environment
    services = {document["metadata"]["name"] for document in documents if document["kind"] == "Service"}
    if values.get("redis", {}).get("enabled", True):
        assert config.slate_store.url == "redis://prod-rankgr-redis:6379/0"
        assert {"prod-rankgr-redis"} <= services
    if values.get("mlflow", {}).get("enabled", True):
        assert config.tracking.uri == "http://prod-rankgr-mlflow:5000"
        assert {"prod-rankgr-mlflow"} <= services


def test_large_numbers_arrive_as_numbers(tmp_path: Path) -> None:
    assert settings(ci_values("production"), tmp_path).streaming.max_length == 5_000_000
    assert serve_config(ci_values("production"))["applications"][0]["args"]["settings"]["streaming"]["max_length"] == 5_000_000


def test_the_trainer_is_one_and_ends_before_another_starts() -> None:
    spec = one(render(EVERYTHING), "Deployment", "-stream")["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})
    assert spec["template"]["spec"]["containers"][0]["command"] == ["rankgr", "stream", "--config", "/etc/rankgr/run.yaml"]


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({}, ["ray", "job", "submit", "--address", "http://prod-rankgr-training-head-svc:8265"]),
        ({"training": {"enabled": False}}, ["rankgr", "run", "--config", "/etc/rankgr/run.yaml"]),
        ({"refresh": {"command": ["rankgr", "sids"]}}, ["rankgr", "sids"]),
    ],
)
def test_the_refresh_runs_on_the_training_cluster_or_alone_or_what_it_is_told(values: dict[str, Any], start: list[str]) -> None:
    refresh = {"enabled": True, **values.get("refresh", {})}
    job = one(render({**values, "refresh": refresh}), "CronJob")["spec"]
    command = job["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[: len(start)] == start
    assert job["concurrencyPolicy"] == "Forbid"


def test_alert_rules_and_dashboards_are_those_of_the_project() -> None:
    documents = render(EVERYTHING)
    rules = yaml.safe_load((ROOT / "infra/prometheus/rules.yaml").read_text("utf-8"))
    assert one(documents, "PrometheusRule")["spec"] == rules
    board = json.loads((ROOT / "infra/grafana/serving.json").read_text("utf-8"))
    assert json.loads(one(documents, "ConfigMap", "-dashboards")["data"]["serving.json"]) == board


@everywhere
def test_monitors_find_services_which_find_pods_that_listen(values: dict[str, Any]) -> None:
    documents = render(values)
    for monitor in (document for document in documents if document["kind"] == "ServiceMonitor"):
        assert monitor["spec"].keys() == {"selector", "namespaceSelector", "endpoints"}
        wanted = monitor["spec"]["selector"]["matchLabels"]
        [service] = [one for one in documents if one["kind"] == "Service" and matches(wanted, one["metadata"]["labels"])]
        ports = service["spec"]["ports"]
        assert [endpoint["port"] for endpoint in monitor["spec"]["endpoints"]] == [port["name"] for port in ports]
        found = [spec for _, labels, spec in pods(documents) if matches(service["spec"]["selector"], labels)]
        assert found
        for spec in found:
            assert {port["targetPort"] for port in ports} <= {one["containerPort"] for one in spec["containers"][0]["ports"]}


@pytest.mark.parametrize("haproxy", [False, True])
def test_the_proxy_that_answers_is_the_one_that_is_looked_after(haproxy: bool) -> None:
    documents = render({**EVERYTHING, "serving": {**EVERYTHING["serving"], "haproxy": haproxy}})
    [monitor] = [one for one in documents if one["kind"] == "ServiceMonitor" and one["metadata"]["name"].endswith("-serving")]
    assert [one["port"] for one in monitor["spec"]["endpoints"]] == (["haproxy", "metrics"] if haproxy else ["metrics"])
    for _, labels, spec in pods(documents):
        if labels["app.kubernetes.io/component"] == "serving":
            variables = {one["name"]: one.get("value") for one in spec["containers"][0]["env"]}
            assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == variables["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == ("1" if haproxy else "0")
            assert variables.get("RAY_SERVE_HAPROXY_RETRY_ON") == ("conn-failure empty-response" if haproxy else None)
            assert variables.get("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S") == (None if haproxy else "60")


@everywhere
def test_services_and_controllers_select_their_own_pods(values: dict[str, Any]) -> None:
    documents = render(values)
    carried = [labels for _, labels, _ in pods(documents)]
    for document in documents:
        if document["kind"] == "Service":
            assert any(matches(document["spec"]["selector"], labels) for labels in carried), document["metadata"]["name"]
        if document["kind"] in ("Deployment", "StatefulSet"):
            own = document["spec"]["template"]["metadata"]["labels"]
            wanted = document["spec"]["selector"]["matchLabels"]
            assert matches(wanted, own)
            assert sum(matches(wanted, labels) for labels in carried) == 1


def test_mlflow_knows_its_options_and_answers_to_the_names_it_is_called_by() -> None:
    """Read from MLflow's source, whose import takes many seconds; it compares names with `*` as fnmatch does, others as they are."""
    container = one(render(EVERYTHING), "Deployment", "-mlflow")["spec"]["template"]["spec"]["containers"][0]
    given = dict(option.partition("=")[::2] for option in container["args"])
    [package] = importlib.util.find_spec("mlflow").submodule_search_locations
    source = "".join((Path(package) / name).read_text("utf-8") for name in ("cli/__init__.py", "utils/cli_args.py"))
    assert [option for option in given if not re.search(f'"{option}["/]', source)] == []
    hosts = given["--allowed-hosts"].split(",")
    called = [
        "prod-rankgr-mlflow:5000",
        "prod-rankgr-mlflow.models:5000",
        "prod-rankgr-mlflow.models.svc.cluster.local:5000",
        "localhost:5000",
    ]
    assert [name for name in called if not any(fnmatch.fnmatch(name, host) for host in hosts)] == []
    assert not any(fnmatch.fnmatch("mlflow.example.com", host) for host in hosts)


@pytest.mark.parametrize(
    ("kind", "name", "command"), [("Deployment", "-stream", "stream"), ("CronJob", "-refresh", "run")], ids=["stream", "refresh"]
)
def test_the_command_takes_the_options_that_it_is_given(kind: str, name: str, command: str, tmp_path: Path) -> None:
    """As a dry run, with the settings of the release."""
    from typer.testing import CliRunner

    from pipelines.cli import app

    [(_, _, spec)] = pods([one(render({**EVERYTHING, "training": {"enabled": False}}), kind, name)])
    program, *arguments = spec["containers"][0]["command"]
    settings(EVERYTHING, tmp_path)
    events, items = write_log(tmp_path)
    given = [str(tmp_path / "run.yaml") if one == "/etc/rankgr/run.yaml" else one for one in arguments]
    if command == "run":
        given += ["--logs", str(events), "--items", str(items), *SETTINGS]
    done = CliRunner().invoke(app, [*given, "--dry-run"])
    assert (program, arguments[0]) == ("rankgr", command)
    assert done.exit_code == 0, done.output
