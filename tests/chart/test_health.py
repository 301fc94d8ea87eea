"""The images' HEALTHCHECKs, run for real: they ask over HTTP, and only a good answer in time is health."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest

from infra.config import Config
from infra.local import free_port
from tests.chart.generate import ROOT
from tests.chart.images import DOCKERFILES, instruction
from tests.chart.rendered import EVERYTHING, one, render

ASKS = {"serve": (8000, "/healthz"), "train": (52365, "/api/local_raylet_healthz")}
"""Role -> port and route."""

every_role = pytest.mark.parametrize("role", DOCKERFILES)


def seconds(role: str, option: str) -> int:
    """An option of a HEALTHCHECK."""
    [found] = re.findall(rf"^HEALTHCHECK .*--{option}=(\d+)s", DOCKERFILES[role].read_text("utf-8"), flags=re.MULTILINE)
    return int(found)


def exit_code(role: str, port: int, *, timeout_s: float | None = None) -> int:
    """Of the check, asking another port, and where it is given waiting less."""
    program, *arguments = instruction(role, "HEALTHCHECK")
    assert program == "python"
    code = arguments[-1].replace(f"{ASKS[role][0]},", f"{port},")
    if timeout_s is not None:
        code = re.sub(r"timeout=\d+", f"timeout={timeout_s}", code)
    assert code != arguments[-1]
    environment = {"http_proxy": f"http://127.0.0.1:{free_port()}"}  # a proxy is for what is outside
    command = [sys.executable, *arguments[:-1], code]
    return subprocess.run(command, env=environment, capture_output=True, timeout=30, check=False).returncode


@contextmanager
def answering(status: int | None, path: str) -> Iterator[int]:
    """A server that answers one path with a status, or not at all, and others with 404; yields its port."""
    ended = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if status is None:
                ended.wait(30)
                return
            self.send_response(status if self.path == path else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_port
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


@every_role
@pytest.mark.parametrize(("status", "expected"), [(200, 0), (204, 0), (302, 1), (404, 1), (500, 1), (503, 1)])
def test_only_a_good_answer_is_health(role: str, status: int, expected: int) -> None:
    with answering(status, ASKS[role][1]) as port:
        assert exit_code(role, port) == expected


@every_role
def test_a_port_that_takes_connections_and_answers_nothing_is_no_health(role: str) -> None:
    with answering(None, ASKS[role][1]) as port:
        assert exit_code(role, port, timeout_s=0.3) == 1


@every_role
def test_nobody_there_is_no_health(role: str) -> None:
    assert exit_code(role, free_port()) == 1


@every_role
def test_the_check_gives_up_before_it_is_ended_and_a_start_has_its_time(role: str) -> None:
    [own] = re.findall(r"timeout=(\d+)", instruction(role, "HEALTHCHECK")[-1])
    assert int(own) < seconds(role, "timeout") <= seconds(role, "interval")
    assert seconds(role, "start-period") >= 60


def test_the_routes_are_those_of_the_service_and_of_the_charts_probes() -> None:
    port, path = ASKS["serve"]
    assert port == Config().serving.port
    assert f'@api.get("{path}"' in (ROOT / "serving/api.py").read_text("utf-8")
    probe = one(render(EVERYTHING), "RayCluster")["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["livenessProbe"]
    assert ASKS["train"] == (probe["httpGet"]["port"], probe["httpGet"]["path"])
