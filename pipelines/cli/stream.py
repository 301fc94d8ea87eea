"""`rankgr stream`: the champion goes on learning from what users do now."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pipelines.cli.common import ConfigFile, DryRun, Overrides, Preset, announce, settings_of
from pipelines.local_run import local_services, redis_url

UntilIdle = Annotated[float | None, typer.Option("--until-idle", min=0, metavar="SECONDS", help="End when no event came for so long.")]
MaxEvents = Annotated[int | None, typer.Option("--max-events", min=1, help="End after so many entries of the stream.")]


def stream(
    until_idle: UntilIdle = None,
    max_events: MaxEvents = None,
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train the champion on events as they come until Ctrl-C; every hour what came of it faces the gate and is released.

    It may be stopped and killed at any time: started again, it goes on from its last checkpoint.

    Example: `rankgr stream --set streaming.sync_every_s=600`, or `rankgr stream --until-idle 5` to work off what is there
    """
    from serving.streaming import train_on_stream

    settings = settings_of(config, preset, overrides)
    if dry_run:
        announce(settings, [f"train the champion on the events of {settings.slate_store.prefix!r}"])
        return
    with local_services(settings, ray=False):
        train_on_stream(settings, redis_url(settings), until_idle=until_idle, max_events=max_events)
    sys.stdout.write("the stream is worked off\n")
