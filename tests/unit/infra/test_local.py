"""Embedded services start, survive, share and end; nothing stays behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import redis

from infra.errors import ConfigError, ServiceError
from infra.local import free_port, mlflow_uri, no_process_left, port_is_free, require_port, valkey

ROOT = Path(__file__).resolve().parents[3]


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "the condition never held"
        os.sched_yield()


def run_command(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A command of its own, as a user would start it; its lines are read from stdout."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def line(command: subprocess.Popen[str]) -> str:
    assert command.stdout is not None
    return command.stdout.readline().strip()


def end(command: subprocess.Popen[str], number: int) -> int:
    command.send_signal(number)
    code = command.wait(timeout=30)
    assert command.stdout is not None
    command.stdout.close()
    return code


def test_ports() -> None:
    port = free_port()
    assert port_is_free("127.0.0.1", port)
    require_port("127.0.0.1", port, setting="serving.port")
    with socket.create_server(("127.0.0.1", port)):
        assert not port_is_free("127.0.0.1", port)
        with pytest.raises(ServiceError, match=f"port {port} is taken") as caught:
            require_port("127.0.0.1", port, setting="serving.port")
    assert "serving.port=0" in caught.value.mend


def test_the_tracking_database_has_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert mlflow_uri("work") == f"sqlite:///{tmp_path}/work/mlflow.db"
    assert (tmp_path / "work").is_dir()
    with pytest.raises(ConfigError, match="tracking"):
        mlflow_uri("s3://bucket/work")


def test_data_survive_the_command(tmp_path: Path) -> None:
    with valkey(tmp_path / "valkey") as url, redis.Redis.from_url(url) as client:
        client.set("kept", "yes")
        assert url.startswith("redis://127.0.0.1:")
        first = int(client.info("server")["process_id"])
    assert not psutil.pid_exists(first)
    with valkey(tmp_path / "valkey") as url, redis.Redis.from_url(url) as client:
        assert client.get("kept") == b"yes"


def test_a_path_that_valkey_cannot_express(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="blanks"), valkey(tmp_path / "my data"):
        pass


OWNER = """
    import sys, time
    from infra.local import valkey
    with valkey(sys.argv[1]) as url:
        print(url, flush=True)
        sys.stdin.read()
"""


def test_an_orphan_of_a_killed_command_is_replaced_and_its_data_taken_over(tmp_path: Path) -> None:
    command = run_command(OWNER, tmp_path)
    with redis.Redis.from_url(line(command)) as client:
        client.set("kept", "yes")
        orphan = psutil.Process(int(client.info("server")["process_id"]))
    end(command, signal.SIGKILL)
    try:
        assert orphan.is_running()
        with valkey(tmp_path) as url, redis.Redis.from_url(url) as client:
            assert client.get("kept") == b"yes"
            assert int(client.info("server")["process_id"]) != orphan.pid
        wait_until(lambda: not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE)
    finally:
        if orphan.is_running():
            orphan.kill()


def test_a_second_command_shares_the_valkey_of_the_first(tmp_path: Path) -> None:
    command = run_command(OWNER, tmp_path)
    first = line(command)
    with valkey(tmp_path) as url:
        assert url == first
    with redis.Redis.from_url(first) as client:
        assert client.ping()
        server = int(client.info("server")["process_id"])
    assert end(command, signal.SIGINT) != 0
    assert not psutil.pid_exists(server)


# Prints the pids of a child, of its child, and of an orphan whose parent has gone; all refuse to end when asked.
TREE = """
    import signal, subprocess, sys
    from infra.local import no_process_left
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    sleep = "print('up', flush=True); import time; time.sleep(600)"
    family = deaf + f'''import os, subprocess, sys
    one = subprocess.Popen([sys.executable, "-c", {deaf + sleep!r}], stdout=subprocess.PIPE, text=True)
    one.stdout.readline()
    middle = subprocess.Popen([sys.executable, "-c", "import subprocess, sys; " +
        "p = subprocess.Popen([sys.executable, '-c', " + repr({sleep!r}) + "], stdout=subprocess.PIPE, text=True);" +
        "p.stdout.readline(); print(p.pid, flush=True)"], stdout=subprocess.PIPE, text=True)
    orphan = middle.stdout.readline().strip()
    middle.wait()
    print(os.getpid(), one.pid, orphan, flush=True)
    import time; time.sleep(600)'''.replace("\\n    ", "\\n")
    with no_process_left(grace_s=1.0):
        child = subprocess.Popen([sys.executable, "-c", family], stdout=subprocess.PIPE, text=True)
        print(child.stdout.readline().strip(), flush=True)
        if sys.argv[1] == "leave":
            pass
        elif sys.argv[1] == "raise":
            raise SystemExit(5)
        else:
            signal.pause()
"""


@pytest.mark.parametrize(
    ("way", "number", "code"),
    [("leave", 0, 0), ("raise", 0, 5), ("wait", signal.SIGINT, -signal.SIGINT), ("wait", signal.SIGTERM, -signal.SIGINT)],
)
def test_no_process_is_left_on_whatever_way_out(way: str, number: int, code: int) -> None:
    command = run_command(TREE, way)
    family = [psutil.Process(int(pid)) for pid in line(command).split()]
    assert len(family) == 3
    try:
        assert end(command, number) == code
        assert [process.pid for process in family if process.is_running()] == []
    finally:
        for process in family:
            if process.is_running():
                process.kill()


def test_processes_of_before_are_spared() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    before = subprocess.Popen(sleep)
    try:
        with no_process_left():
            inside = subprocess.Popen(sleep)
        assert not psutil.pid_exists(inside.pid)
        assert before.poll() is None
    finally:
        before.kill()
        before.wait()
        inside.wait()
