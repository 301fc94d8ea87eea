"""Ray: connect to a cluster, or run one on this machine that ends with the command.

A local cluster listens on the loopback interface only and asks for a token that is made up for the session, so that
neither the network nor another user of the machine can run code in it. Address and token travel to child processes in
the environment: each pipeline step is a process of its own and joins the same cluster.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from infra.errors import RankGRError, ServiceError
from infra.logs import get_logger
from infra.service_sections import ClusterConfig

_ROOT = Path(__file__).resolve().parent.parent
_MAX_TEMP_PATH = 40  # Ray adds about 65 characters, a Unix socket's path ends at 107
_REACH_S = 5.0
_NICENESS = "RAY_worker_niceness"
RAYS_NICENESS = 15  # what Ray gives its workers when it is not told
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray would read a line of HAProxy's log a request, in Python: a tenth of two cores at 1,300 a second. Replicas count as well.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # Behind HAProxy, too, a request whose replica died goes to another one (see `serving.repeats`). The dead one has the fewest
    # connections, which brings it more of them until it is found out: three attempts, HAProxy's default, are not enough.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "10",
    # Ray's own proxy, saturated by readers, answers its controller's checks late; after three of them it would be killed, 10 s each.
    # HAProxy's manager, which answers nobody else, has the same minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


@contextmanager
def ray_session(config: ClusterConfig, *, niceness: int = RAYS_NICENESS) -> Iterator[str]:
    """Be connected to Ray inside the context; yields the cluster's address.

    The cluster is `config.address`, else RAY_ADDRESS, else a local one. Inside a session that is already open nothing
    happens.

    Args:
        config: of the cluster.
        niceness: of a local cluster's workers. Where they answer somebody it should be 0: at Ray's own 15 every other process of the
            machine comes before them, and what is meant to give way to them hardly can.

    Raises:
        ServiceError: the cluster cannot be reached, or a local one does not start.
    """
    import ray

    if ray.is_initialized():
        yield str(ray.get_runtime_context().gcs_address)
        return
    address = config.address or os.environ.get("RAY_ADDRESS", "")
    if not address:
        with _local_cluster(config, niceness) as address:
            yield address
        return
    connect(config)
    try:
        with _environment({"RAY_ADDRESS": address}):
            yield address
    finally:
        ray.shutdown()


def kill_local_actors(name: str) -> None:
    """Kill the actors of a class in a cluster that this process started; those of another cluster end with their job."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{name}"):
                process.kill()


def connect(config: ClusterConfig, *, log_to_driver: bool = False) -> None:
    """Join the cluster at `config.address` or RAY_ADDRESS; a second call does nothing.

    Raises:
        ServiceError: no address is known, nothing listens there, or the token is refused.
    """
    import ray

    address = config.address or os.environ.get("RAY_ADDRESS", "")
    if not address:
        raise ServiceError("no Ray cluster is known", mend="set cluster.address or RAY_ADDRESS")
    os.environ.update({name: value for name, value in _DEFAULTS.items() if name not in os.environ})
    if ray.is_initialized():
        return
    _require_listener(address)
    quiet_ray()
    try:
        with _signal_handlers_kept():
            ray.init(address=address, ignore_reinit_error=True, log_to_driver=log_to_driver, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ServiceError(
            f"the Ray cluster refused the connection: {reason}",
            where=address,
            mend="check that it runs the same Ray and the RAY_AUTH_* variables",
        ) from error


def use_token() -> None:
    """Have clients of Ray's HTTP interfaces send RAY_AUTH_TOKEN where it is set; by itself Ray does only with RAY_AUTH_MODE=token."""
    if os.environ.get("RAY_AUTH_TOKEN") and not os.environ.get("RAY_AUTH_MODE"):
        os.environ["RAY_AUTH_MODE"] = "token"
        _reread_environment()


def quiet_ray(*, errors_too: bool = False) -> None:
    """Leave only warnings of Ray's own loggers.

    Args:
        errors_too: silence Ray Data altogether, for callers who raise what went wrong themselves.
    """
    for name in ("ray", "ray.data", "ray.serve", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if errors_too:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)


@contextmanager
def _local_cluster(config: ClusterConfig, niceness: int) -> Iterator[str]:
    import ray

    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Ray replaces 127.0.0.1 by an address that other machines can reach, unless it believes to be on a desktop.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        _NICENESS: os.environ.get(_NICENESS, str(niceness)),
        # Nobody takes nodes away from a cluster of this machine: a process less.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # Requests whose replica dies are repeated by Ray Serve's proxies.
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.repeats.middlewares",
        # Workers import the project's packages from the checkout.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")])),
        **{name: value for name, value in _DEFAULTS.items() if name not in os.environ},
    }
    folder = _short_temp_folder()
    variables |= _haproxy_files(f"{folder}/h")
    with _ray_environment(variables):
        quiet_ray()
        try:
            with _signal_handlers_kept():
                context = ray.init(
                    num_cpus=config.cpus,
                    object_store_memory=config.object_store_mb << 20,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=f"{folder}/r",  # Ray opens its folder to everybody; the one around it stays ours
                )
            address = str(context.address_info["address"])
            with _environment({"RAY_ADDRESS": address}):
                yield address
        except Exception as error:
            get_logger("ray").info("Ray's logs are kept", folder=f"{folder}/r/session_latest/logs")
            if ray.is_initialized():
                raise
            raise ServiceError(
                f"Ray does not start: {str(error).splitlines()[0]}",
                where=folder,
                mend="look at the logs there, free memory, or use another cluster",
            ) from error
        finally:
            ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def _haproxy_files(folder: str) -> dict[str, str]:
    """Where Ray Serve puts the files of HAProxy, if it is told to use it: by default in one folder for all users of a machine."""
    files = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "SERVER_STATE_FILE": "state",
        "METRICS_SOCKET_PATH": "metrics.sock",
    }
    places = {f"RAY_SERVE_HAPROXY_{name}": f"{folder}/{file}" for name, file in files.items()}
    places["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"] = folder
    return {name: place for name, place in places.items() if name not in os.environ}


@contextmanager
def _ray_environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables that Ray reads when it is imported, and have it read them again.

    Ray has no public call for that. Its own tests do the same (ray._private.authentication_test_utils).
    """
    try:
        with _environment(variables):
            _reread_environment()
            yield
    finally:
        _reread_environment()


def _reread_environment() -> None:
    from ray._private import ray_constants

    raylet: Any = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    on_desktop = sys.platform in ("darwin", "win32")
    setting = os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, str(int(not on_desktop)))
    ray_constants.ENABLE_RAY_CLUSTER = setting.lower() in ("1", "true")


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """`ray.init` installs a SIGTERM handler of its own over ours (`infra.local.no_process_left`), and a debugger for `breakpoint()`."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with _environment({"PYTHONBREAKPOINT": os.environ.get("PYTHONBREAKPOINT", "")}):
            yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _short_temp_folder() -> str:
    parent = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="rgr-", dir=parent if len(parent) < _MAX_TEMP_PATH - 15 else "/tmp")  # noqa: S108 - private to this user


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables, and put back what was there before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _require_listener(address: str) -> None:
    """Fail at once where nothing listens: Ray itself would try for half a minute."""
    if address == "auto":
        return
    parts = urlsplit(address if "://" in address else f"ray-gcs://{address}")
    try:
        host, port = parts.hostname or "", parts.port or 10001
        socket.create_connection((host, port), timeout=_REACH_S).close()
    except (OSError, ValueError) as error:
        raise ServiceError(
            f"no Ray cluster answers: {error}", where=address, mend="start it, or unset cluster.address and RAY_ADDRESS for a local one"
        ) from error


def unwrap(error: BaseException) -> BaseException:
    """The error of ours that a Ray task or a Ray Train worker raised, out of the wrappers that Ray puts around it.

    Returns:
        `error` itself where none of ours is behind it.
    """
    pending: list[Any] = [error]
    while pending:
        seen = pending.pop(0)
        # Ray's wrapper of an error is of the error's type too, with a traceback for a message.
        if isinstance(seen, RankGRError) and getattr(seen, "cause", None) is None:
            return seen
        inner = (getattr(seen, "cause", None), getattr(seen, "_base_exc", None), seen.__cause__)
        pending += [e for e in (*inner, *getattr(seen, "worker_failures", {}).values()) if e is not None]
    return error
