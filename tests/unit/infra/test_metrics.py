"""What the dashboard and the alert rules ask for is what the code counts."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from infra.errors import ServiceError
from infra.metrics import METRICS, MODEL, PREFIX, TRAINER, Meter, exported, text_of
from tests.serving import wait_for
from tests.tools import tool

ROOT = Path(__file__).resolve().parents[3]
RULES = ROOT / "infra" / "prometheus" / "rules.yaml"
DASHBOARD = ROOT / "infra" / "grafana" / "serving.json"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
EXPORTED = {PREFIX + name + suffix for name, metric in METRICS.items() for suffix in SUFFIXES[metric.kind]}


def rules() -> list[dict[str, str]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]] + [rule["expr"] for rule in rules()]


def test_dashboard_and_rules_ask_for_metrics_that_exist() -> None:
    for expression in expressions():
        names = set(re.findall(r"ray_\w+", expression))
        assert names, expression
        assert names <= EXPORTED, expression
        for name, labels in re.findall(r"(ray_\w+)\{([^}]*)\}", expression):
            metric = METRICS[re.sub("_(total|bucket|sum|count)$", "", name.removeprefix(PREFIX))]
            assert set(re.findall(r"(\w+)(?==|!=)", labels)) <= set(metric.tags), expression


def test_every_metric_is_counted_somewhere_and_shown() -> None:
    counted = set()
    for path in (ROOT / "serving").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("count", "observe", "set"):
                counted |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and str(arg.value).startswith("rankgr_")}
    assert counted == set(METRICS)
    text = " ".join(expressions())
    assert [name for name in METRICS if PREFIX + name not in text] == []


def test_every_rule_has_a_name_a_way_out_and_a_story_in_which_it_speaks_and_one_in_which_it_is_silent() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert {"summary", "mend"} <= set(rule["annotations"])
    tests = yaml.safe_load((RULES.parent / "rules_test.yaml").read_text())
    told = {(one["alertname"], bool(one["exp_alerts"])) for test in tests["tests"] for one in test["alert_rule_test"]}
    assert told == {(name, speaks) for name in names for speaks in (True, False)}


@pytest.mark.parametrize("command", ["check rules rules.yaml", "test rules rules_test.yaml"])
def test_promtool_agrees(command: str) -> None:
    done = subprocess.run([tool("promtool"), *command.split()], cwd=RULES.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_reasons_are_those_for_which_the_stream_rejects() -> None:
    source = (ROOT / "infra" / "event_stream.py").read_text()
    reasons = {"unknown item", "duplicate", "trimmed before it was read", *re.findall(r'_UnusableError\("([^"]+)"\)', source)}
    assert set(METRICS["rankgr_stream_rejected"].known) == reasons
    assert all(f'"{reason}"' in source for reason in reasons)


def test_a_counter_is_there_before_anything_happens() -> None:
    lines = Meter(MODEL).text().decode().splitlines()
    assert 'ray_rankgr_swaps_total{outcome="refused"} 0.0' in lines
    assert not [line for line in lines if "slates" in line or "_created" in line]


def test_the_metrics_of_replicas_stay_apart() -> None:
    one, other = Meter(), Meter()
    one.count("rankgr_slates", 2, source="fresh")
    other.count("rankgr_slates", 3, source="fresh")
    other.observe("rankgr_slate_seconds", 0.002)
    text = text_of({"a": one.families(), "b": other.families(), "model": Meter(MODEL).families()}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    slates = {s.labels["replica"]: s.value for s in families["ray_rankgr_slates"].samples if s.labels["source"] == "fresh"}
    assert slates == {"a": 2.0, "b": 3.0}
    assert {s.labels["replica"] for s in families["ray_rankgr_swaps"].samples} == {"model"}
    assert text.count("# TYPE ray_rankgr_slate_seconds histogram") == 1


def test_a_process_outside_ray_answers_prometheus_itself() -> None:
    meter = Meter(TRAINER)
    with exported(meter, "127.0.0.1", 0, setting="streaming.metrics_port") as url:
        meter.set("rankgr_stream_lag_entries", 7)
        assert "ray_rankgr_stream_lag_entries 7.0" in httpx.get(url).text.splitlines()
        port = int(url.split(":")[2].split("/")[0])
        again = exported(meter, "127.0.0.1", port, setting="streaming.metrics_port")
        with pytest.raises(ServiceError, match=f"port {port} is taken") as error, again:
            pass
        assert "streaming.metrics_port=0" in error.value.mend
    with exported(meter, "127.0.0.1", port, setting="streaming.metrics_port"):
        pass


def test_a_meter_counts_under_the_names_that_ray_exports() -> None:
    meter = Meter()
    meter.count("rankgr_slates", 2, source="fresh")
    meter.observe("rankgr_slate_seconds", 0.002)
    meter.set("rankgr_pending_slates", 3)
    lines = meter.text().decode().splitlines()
    assert 'ray_rankgr_slates_total{source="fresh"} 2.0' in lines
    assert 'ray_rankgr_slate_seconds_bucket{le="0.003"} 1.0' in lines
    assert "ray_rankgr_pending_slates 3.0" in lines


@ray.remote(num_cpus=0)
class Counting:
    """A process of a Ray cluster that counts; the first look at its figures fails."""

    def __init__(self) -> None:
        self.meter = Meter(to_ray=True)
        self.meter.registry.register(_FailsOnce())

    def count(self) -> None:
        self.meter.count("rankgr_slates", 2, source="fresh")
        self.meter.observe("rankgr_slate_seconds", 0.002)
        self.meter.set("rankgr_pending_slates", 3)


class _FailsOnce(Collector):
    def __init__(self) -> None:
        self._has_failed = False

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> list[Any]:
        if not self._has_failed:
            self._has_failed = True
            raise RuntimeError("the first time")
        return []


@pytest.mark.usefixtures("ray_cluster")
def test_a_prometheus_that_watches_the_cluster_finds_what_its_processes_count() -> None:
    counting = Counting.remote()  # type: ignore[attr-defined]  # Ray adds it
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def found() -> dict[tuple[str, str], float]:
        text = httpx.get(url, headers={"Accept": "text/plain;version=0.0.4"}).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {(s.name, s.labels.get("source") or s.labels.get("le") or ""): s.value for s in samples if "rankgr" in s.name}

    def wait_for_slates(times: int) -> None:
        wanted = {
            ("ray_rankgr_slates_total", "fresh"): 2.0 * times,
            ("ray_rankgr_slates_total", "stale"): 0.0,
            ("ray_rankgr_slate_seconds_bucket", "0.001"): 0.0,
            ("ray_rankgr_slate_seconds_bucket", "0.003"): 1.0 * times,
            ("ray_rankgr_slate_seconds_bucket", "+Inf"): 1.0 * times,
            ("ray_rankgr_slate_seconds_count", ""): 1.0 * times,
            ("ray_rankgr_slate_seconds_sum", ""): 0.002 * times,
            ("ray_rankgr_pending_slates", ""): 3.0,
        }
        wait_for(lambda: wanted.items() <= found().items(), f"the samples of {times}")

    try:
        for times in (1, 2):
            ray.get(counting.count.remote())
            wait_for_slates(times)
    finally:
        ray.kill(counting)
