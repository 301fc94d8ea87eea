"""What the benchmarks share: interleaved timing, the line about the machine, the table, the line of JSON at the end."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

console = Console(width=120, record=True)
RESULTS = Path(__file__).parent / "results"
Clock = Callable[[], float]


@dataclass(frozen=True)
class Side:
    """One contender.

    Attributes:
        run: does the whole work once.
        rounds: takes part in so many of the rounds; slow peers in fewer.
        repeats: runs a round, of which the mean counts; for work too short for the clock.
    """

    run: Callable[[], object]
    rounds: int = 5
    repeats: int = 1


def interleave(sides: Mapping[str, Side], clock: Clock) -> dict[str, float]:
    """Median seconds of each side, measured in turns so that a change of the machine's mood meets all of them.

    The median, because it does not favour the side that ran more often, as the minimum would.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for at in range(max(side.rounds for side in sides.values())):
        for name, side in sides.items():
            if at < side.rounds:
                start = clock()
                for _ in range(side.repeats):
                    side.run()
                seconds[name].append((clock() - start) / side.repeats)
    return {name: statistics.median(values) for name, values in seconds.items()}


def clock_for(device: str) -> Clock:
    """CPU time of this process if one thread does all the work, so that other processes disturb little; else wall time."""
    if device.startswith("cuda"):
        return _after_the_device
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _after_the_device() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def parse(
    description: str | None, *, device: bool = False, extra: Callable[[argparse.ArgumentParser], None] = lambda _: None
) -> argparse.Namespace:
    """`quick`, `threads` and, where asked for, `device` from the command line; sets torch's threads."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows and repetitions, under 60 seconds")
    parser.add_argument("--write", action="store_true", help="keep what is printed below tests/benchmarks/results")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for all sides alike")
    if device:
        parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    extra(parser)
    arguments = parser.parse_args()
    if arguments.quick and arguments.write:
        parser.error("--write keeps full runs: leave --quick out")
    torch.set_num_threads(arguments.threads)
    return arguments


def environment(device: str = "cpu") -> str:
    """Date, versions, processor, threads and load: what a figure means nothing without."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    busy = f"{os.getloadavg()[0]:.1f} busy" if hasattr(os, "getloadavg") else "unknown load"
    line = (
        f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}, Python {platform.python_version()}, {packages}, "
        f"{processor()}, {os.cpu_count()} cores ({busy}), {torch.get_num_threads()} thread(s)"
    )
    if device.startswith("cuda"):
        return f"{line}, {torch.cuda.get_device_name()}, wall time"
    return f"{line}, {'CPU' if clock_for(device) is time.process_time else 'wall'} time"


def announce(device: str = "cpu") -> None:
    """Print `environment`."""
    console.print(environment(device), highlight=False, soft_wrap=True)


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; all columns but the first are figures."""
    console.print(title, style="bold", highlight=False)
    shown = Table()
    for index, column in enumerate(columns):
        shown.add_column(column, justify="right" if index else "left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def milliseconds(seconds: float) -> str:
    """For a table."""
    value = seconds * 1e3
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.3f} ms"


def times(ratio: float) -> str:
    """For a table."""
    return f"{ratio:,.0f}x" if ratio >= 100 else f"{ratio:.2f}x"


def finish(result: Mapping[str, object], arguments: argparse.Namespace, *, folder: Path = RESULTS) -> None:
    """The result as the last line; with `--write` all that was printed goes into `results/<bench>[-cuda].md`.

    Args:
        result: with the key `bench`.
        arguments: of `parse`.
        folder: where the file goes.
    """
    rounded = {name: round(value, 3) if isinstance(value, float) and abs(value) > 1e-2 else value for name, value in result.items()}
    console.out(json.dumps(rounded), highlight=False)
    if arguments.write:
        name, device = str(result["bench"]), getattr(arguments, "device", "cpu")
        command = " ".join(["python -m", f"tests.benchmarks.{name}", *(a for a in sys.argv[1:] if a != "--write")])
        text = f"# Benchmark: {name}\n\n`{command}`\n\n```\n{console.export_text().rstrip()}\n```\n"
        (folder / f"{name}{'' if device == 'cpu' else f'-{device}'}.md").write_text(text, "utf-8")
