"""`rankgr plan`: replicas, memory and cost of a service of a given size, and shards for its log."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.table import Table

from pipelines.cli.common import DryRun, console


def plan(
    users: Annotated[int, typer.Option("--users", min=1, help="Users with a slate.")],
    items: Annotated[int, typer.Option("--items", min=1, help="Items of the catalogue.")],
    rps: Annotated[float, typer.Option("--rps", min=0, help="Slate reads a second at the peak.")],
    events: Annotated[int | None, typer.Option("--events", min=1, help="Events of the log, to plan its shards.")] = None,
    early_share: Annotated[float, typer.Option("--early-share", min=0, max=1, help="Of them, behind an early trigger.")] = 0.1,
    bulk_hours: Annotated[float, typer.Option("--bulk-hours", min=0.1, help="Time of a bulk run.")] = 4.0,
    slate_size: Annotated[int, typer.Option("--slate-size", min=1, help="Items a slate.")] = 100,
    proxy: Annotated[Literal["haproxy", "default"], typer.Option("--proxy", help="In front of the replicas.")] = "haproxy",
    core_price: Annotated[float | None, typer.Option("--core-price", min=0, help="Of a core for a month.")] = None,
    gb_price: Annotated[float | None, typer.Option("--gb-price", min=0, help="Of a GB of memory for a month.")] = None,
    dry_run: DryRun = False,  # noqa: ARG001 - it only calculates
) -> None:
    """Say what a service of this size takes, from the figures measured with the quickstart's model.

    Example: `rankgr plan --users 1000000 --items 100000 --rps 2000 --events 50000000 --core-price 20 --gb-price 3`
    """
    from serving.sizing import HEADROOM, Load, plan_of, sharding_of, slate_bytes

    load = Load(users, items, rps, early_share=early_share, slate_size=slate_size, bulk_hours=bulk_hours)
    found = plan_of(load, proxy=proxy)
    table = Table(title=f"{users:,} users, {items:,} items, {rps:,.0f} reads a second")
    table.add_column("what")
    table.add_column("", justify="right")
    rows = {
        "ingress replicas (serving.retrieval_replicas)": f"{found.ingress_replicas}",
        "model replicas (serving.precompute_max_replicas)": f"{found.model_replicas}",
        f"cores, {HEADROOM:.0%} of each planned with, two of them for proxies and Ray": f"{found.cores}",
        f"cores of a bulk run of {bulk_hours:g} h (serving.precompute_actors)": f"{found.bulk_cores}",
        f"Redis, {load.versions} versions of slates of {slate_bytes(load):,} bytes": f"{found.redis_gb:,.2f} GB",
        "memory of the service": f"{found.service_gb:,.2f} GB",
    }
    if events is not None:
        cut = sharding_of(events, users)
        rows[f"shards of {events:,} events (data.shards)"] = f"{cut.shards:,}"
        rows["memory of a worker of the step sessions"] = f"{cut.worker_gb:,.2f} GB"
        rows["files that it exchanges, at least"] = f"{cut.exchanged_files:,}"
    if core_price is not None and gb_price is not None:
        rows["cost a month"] = f"{found.cost(core=core_price, gb=gb_price):,.0f}"
    for what, value in rows.items():
        table.add_row(what, value)
    console.print(table)
