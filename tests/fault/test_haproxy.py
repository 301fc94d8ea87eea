"""The service behind HAProxy: in processes of its own, since Ray reads once whether it is there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from infra.local import free_port
from tests.command import ROOT, environment
from tests.fault.behind_haproxy import READERS
from tests.serving import TOKEN

KILLS = 2
SETTINGS = (
    "serving.port=0",
    "serving.tokens=[env:RANKGR_TEST_TOKEN]",
    "serving.retrieval_replicas=2",
    "serving.precompute_max_replicas=1",
    "decoding.slate_size=5",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ports = {name: str(free_port()) for name in ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")}
    mode = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RANKGR_TEST_TOKEN": TOKEN}
    arguments = (str(tmp_path_factory.mktemp("haproxy")), json.dumps(SETTINGS), str(KILLS))
    command = [sys.executable, "-m", "tests.fault.behind_haproxy", *arguments]
    variables = {**environment(), **mode, **ports}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_it_answers_as_ray_serves_own_proxy_does(found: dict[str, Any]) -> None:
    slate = found["slate"]
    assert (slate["user_id"], slate["source"], slate["model_version"]) == ("u1", "stored", found["version"])
    assert [item["title"] for item in slate["items"]] == [f"Title {number}" for number in range(5)]
    assert found["fresh"] == "fresh"


def test_it_asks_for_a_token(found: dict[str, Any]) -> None:
    assert found["refused"] == 401


def test_it_has_figures_for_prometheus(found: dict[str, Any]) -> None:
    [counted] = re.findall(r'^haproxy_frontend_http_requests_total\{proxy="http_frontend"\} (\d+)', found["figures"], re.MULTILINE)
    assert int(counted) > 0


def test_of_a_killed_replicas_requests_only_answers_that_had_begun_fail(found: dict[str, Any]) -> None:
    answers = dict(found["answers"])
    begun = sum(answers.pop(name) for name in list(answers) if "without sending complete message body" in name)
    assert set(answers) <= {"stored", "fresh"}, answers
    assert begun <= READERS * KILLS  # each has one request under way
