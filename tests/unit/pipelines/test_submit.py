"""`rankgr submit` against a server that speaks as much of Kubeflow's API as a submission takes."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.command import rankgr_here

LOGS = ("--logs", "s3://raw/events.parquet", "--set", "workspace=s3://bucket/rankgr", "--set", "tracking.uri=https://mlflow")


class Kubeflow(BaseHTTPRequestHandler):
    """Answers what the client asks on its way to a run, and keeps it."""

    seen: list[tuple[str, str, str, Any]]

    def do_GET(self) -> None:
        self._answer({"experiments": [{"experiment_id": "e1", "display_name": "rankgr"}]} if "experiments" in self.path else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_run = self.path.split("?")[0].endswith("/runs")
        self._answer({"run_id": "run-1"} if is_run else {"experiment_id": "e1", "display_name": "rankgr"}, body)

    def _answer(self, content: dict[str, Any], body: Any = None) -> None:
        token = self.headers.get("Authorization", "")
        self.seen.append((self.command, self.path, token, body))
        data = json.dumps(content).encode()
        self.send_response(200 if token == "Bearer let-me-in" else 401)  # noqa: S105 - of the test
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[str, str, str, Any]]]]:
    Kubeflow.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Kubeflow) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", Kubeflow.seen
        http.shutdown()


def test_a_run_is_started_with_its_parameters_and_the_token(server: tuple[str, list[Any]], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("let-me-in\n")
    where = ("--host", server[0], "--token", f"file:{tmp_path / 'token'}", "--namespace", "team", "--experiment", "rankgr")
    (tmp_path / "run.yaml").write_text("preset: kuairand\ntraining: {epochs: 3}\n")
    settings = ("--config", str(tmp_path / "run.yaml"))
    done = rankgr_here("submit", *where, "--pipeline", "refresh", *settings, *LOGS, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "run-1"
    (body,) = [body for method, path, _, body in server[1] if method == "POST" and path.split("?")[0].endswith("/runs")]
    given = body["runtime_config"]["parameters"]
    assert (given["preset"], given["logs_uri"], given["overrides"]) == ("kuairand", LOGS[1], [LOGS[3], LOGS[5]])
    assert json.loads(given["config"]) == {"training": {"epochs": 3}}
    assert "rankgr-refresh" in json.dumps(body["pipeline_spec"])


def test_a_server_that_refuses_the_token_is_told(server: tuple[str, list[Any]], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("wrong")
    done = rankgr_here("submit", "--host", server[0], "--token", f"file:{tmp_path / 'token'}", *LOGS, folder=tmp_path)
    assert done.returncode == 6
    assert "Kubeflow refuses: 401" in done.stderr


def test_a_dry_run_checks_and_asks_no_server(server: tuple[str, list[Any]], tmp_path: Path) -> None:
    done = rankgr_here("submit", "--host", server[0], *LOGS, "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"would start training on http://127", done.stdout)
    assert server[1] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--logs", "s3://raw/e.parquet"), "share neither this machine's folders"),
        (LOGS[:4], "--set tracking.uri=https://..."),
        ((*LOGS, "--items", "items.csv"), "--items s3://..."),
        ((*LOGS, "--set", "sed=1", "--preset", "tny"), "2 of the parameters cannot be used"),
        ((*LOGS, "--node-selector", "gpu"), "cannot read the node selector"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_sent(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = rankgr_here("submit", "--host", "http://127.0.0.1:9", *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
