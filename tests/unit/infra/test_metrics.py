"""What the dashboard and the alert rules ask for is what the code counts."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from infra.metrics import METRICS, PREFIX, Meter

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


def test_the_rules_have_a_name_and_a_way_out_and_their_tests_name_rules_that_are_there() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert {"summary", "mend"} <= set(rule["annotations"])
    tests = yaml.safe_load((RULES.parent / "rules_test.yaml").read_text())
    assert {one["alertname"] for test in tests["tests"] for one in test["alert_rule_test"]} <= set(names)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_agrees() -> None:
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "rules_test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=RULES.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_meter_counts_under_the_names_that_ray_exports() -> None:
    meter = Meter()
    meter.count("rankgr_slates", 2, source="fresh")
    meter.observe("rankgr_slate_seconds", 0.002)
    meter.set("rankgr_pending_slates", 3)
    lines = meter.text().decode().splitlines()
    assert 'ray_rankgr_slates_total{source="fresh"} 2.0' in lines
    assert 'ray_rankgr_slate_seconds_bucket{le="0.003"} 1.0' in lines
    assert "ray_rankgr_pending_slates 3.0" in lines
