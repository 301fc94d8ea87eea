"""A local cluster is private, shared by the processes of a command, and gone afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import ray

from infra.cluster import connect, ray_session, unwrap
from infra.errors import DataError, RankGRError
from infra.local import free_port
from infra.service_sections import ClusterConfig

ROOT = Path(__file__).resolve().parents[3]
STEP = """
    import os, sys
    import ray
    from infra.cluster import connect
    from infra.service_sections import ClusterConfig
    connect(ClusterConfig())
    @ray.remote(num_cpus=0.1)
    def where():
        import components.retriever.contract  # workers import the checkout
        return ray.get_runtime_context().gcs_address
    print(ray.get(where.remote()), flush=True)
    if sys.argv[1:] == ["hang"]:
        sys.stdin.read()
"""


def step(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(STEP), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip


def test_a_step_joins_the_cluster_and_can_do_so_again_after_a_kill(ray_cluster: str) -> None:
    with step("hang") as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline().strip() == ray_cluster
        killed.send_signal(signal.SIGKILL)
    out, err = step().communicate(timeout=60)
    assert out.strip() == ray_cluster
    assert err == ""


def test_a_session_inside_a_session_is_the_same(ray_cluster: str) -> None:
    with ray_session(ClusterConfig()) as inner:
        assert inner == ray_cluster
    connect(ClusterConfig())
    assert ray.is_initialized()


def test_the_cluster_listens_on_the_loopback_interface_only(ray_cluster: str) -> None:
    assert ray_cluster.startswith("127.0.0.1:")
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    listening = {
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.pid in ours and connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert listening


def test_without_the_token_nobody_gets_in(ray_cluster: str) -> None:
    out, err = step(RAY_AUTH_TOKEN="0" * 64, RAY_NUM_REDIS_GET_RETRIES="3").communicate(timeout=90)
    assert out == ""
    assert "refused the connection" in err


def test_an_error_of_ours_comes_out_of_a_task_whole(ray_cluster: str) -> None:
    @ray.remote(num_cpus=0.1)
    def fail() -> None:
        raise DataError("no events", where="logs", mend="add some")

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(fail.remote())
    error = unwrap(caught.value)
    assert isinstance(error, RankGRError)
    assert (error.what, error.where, error.mend, error.exit_code) == ("no events", "logs", "add some", 3)


def test_a_saturated_proxy_has_a_minute_to_answer_its_controller(ray_cluster: str) -> None:
    @ray.remote(num_cpus=0.1)
    def patience() -> float:
        from ray.serve._private.constants import PROXY_HEALTH_CHECK_TIMEOUT_S

        return float(PROXY_HEALTH_CHECK_TIMEOUT_S)

    assert ray.get(patience.remote()) == 60


LIFE = """
    import os, sys
    before = dict(os.environ)
    import ray
    from infra.cluster import connect, ray_session
    from infra.service_sections import ClusterConfig
    from infra.errors import ServiceError
    try:
        connect(ClusterConfig())
    except ServiceError as error:
        print(error.what)
    for address in sys.argv[1:]:
        try:
            connect(ClusterConfig(address=address))
        except ServiceError as error:
            print(error.what)
    changed = dict(os.environ)
    with ray_session(ClusterConfig(cpus=2)) as address:
        assert os.environ["RAY_ADDRESS"] == address
        print(int(ray.cluster_resources()["CPU"]), "CPUs")
    assert os.environ == changed, set(os.environ) ^ set(changed)
    import psutil
    print(psutil.Process().children(recursive=True))
"""


def test_a_cluster_of_its_own_leaves_nothing_behind() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", textwrap.dedent(LIFE), f"127.0.0.1:{free_port()}", "nowhere:port"],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    first, *unreachable, third, fourth = done.stdout.splitlines()
    assert first == "no Ray cluster is known"
    assert [line.partition(":")[0] for line in unreachable] == ["no Ray cluster answers"] * 2
    assert (third, fourth) == ("2 CPUs", "[]")
