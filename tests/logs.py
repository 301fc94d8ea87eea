"""A small log whose next item can be learned: each user walks through the catalogue from a start of their own."""

from __future__ import annotations

import csv
import random
from pathlib import Path

USERS, ITEMS, EVENTS = 60, 40, 18
START_S = 1_700_000_000
LIKES = "data.columns.signals={like: liked}"
COLUMNS = ["--user-column", "uid", "--item-column", "sku", "--time-column", "at", "--level-column", "stage", "--time-unit", "s"]
COLUMNS += ["--set", LIKES]
SETTINGS = [
    part for column in ("user_id=uid", "item_id=sku", "timestamp=at", "level=stage") for part in ("--set", f"data.columns.{column}")
] + ["--set", "data.timestamp_unit=s", "--set", LIKES]
"""The same mapping for commands without flags of their own."""


def write_log(folder: Path, *, bad_rows: int = 0) -> tuple[Path, Path]:
    """Events and items as CSV with column names and a time unit of the user's own."""
    chance = random.Random(7)
    events, items = folder / "events.csv", folder / "items.csv"
    with events.open("w", newline="") as stream:
        log = csv.writer(stream)
        log.writerow(["uid", "sku", "at", "stage", "liked"])
        for user in range(USERS):
            start, time = chance.randrange(ITEMS), START_S + user
            for step in range(EVENTS):
                time += 7200 if step % 6 == 0 else 60
                item = (start + step) % ITEMS
                log.writerow([f"u{user}", f"sku-{item:02d}", time, chance.choice([2, 3, 3, 4]), int(item % 3 == 0)])
        log.writerows([["u0", "sku-00", START_S, 9, 0]] * bad_rows)
    with items.open("w", newline="") as stream:
        catalogue = csv.writer(stream)
        catalogue.writerow(["sku", "title", "category"])
        catalogue.writerows([[f"sku-{i:02d}", f"Thing number {i}", f"shelf {i // 10}"] for i in range(ITEMS)])
    return events, items
