"""Run a step once: same inputs, settings and code lead to the same folder, and a finished folder is not redone.

A run is one walk through the steps; each leaves a record in `workspace/runs/<run id>/`, from which the report is made.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra import errors, storage
from infra.config import PRESETS, Config, load_config
from infra.errors import RankGRError
from infra.logs import configure_logs, get_logger

_ROOT = Path(__file__).resolve().parent.parent
_RECORDED = "recorded_at_ns"
_STEP, _ERROR, _LATEST = ".step.json", ".error.json", "latest.json"


@dataclass(frozen=True)
class Run:
    """One walk through the steps.

    Attributes:
        config: of the run.
        run_id: names its records.
        fresh: redo finished steps.
    """

    config: Config
    run_id: str = "manual"
    fresh: bool = False


@dataclass(frozen=True)
class StepResult:
    """Where a step's output lies and how it came about.

    Attributes:
        name: the step.
        uri: its committed folder.
        skipped: it had been finished before.
        seconds: that the work took when it was done.
        metadata: of the manifest.
    """

    name: str
    uri: str
    skipped: bool
    seconds: float
    metadata: dict[str, Any] = field(default_factory=dict)


def name_of(step: Callable[..., StepResult]) -> str:
    """The name of a step, which its module holds as `STEP`."""
    return str(vars(sys.modules[step.__module__])["STEP"])


def code_version(packages: Sequence[str]) -> str:
    """sha256 over sources: files, or all sources below folders, relative to the checkout."""
    digest = hashlib.sha256()
    for package in sorted(packages):
        root = _ROOT / package
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.suffix in (".py", ".j2"):
                digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def content_of(uri: str) -> str:
    """What identifies the contents of a committed folder.

    Raises:
        IntegrityError: it was never committed, or a file does not match its hash.
    """
    return storage.open_committed(uri).digest


def step_folder(workspace: str, name: str, *, settings: Mapping[str, Any], inputs: Mapping[str, str], code: Sequence[str]) -> str:
    """Where a step's output lies: the same for the same inputs, settings and code (`run_step`)."""
    key = storage.hash_json({"settings": settings, "inputs": inputs, "code": code_version(code)})[:16]
    return storage.join(workspace, "steps", name, key)


def run_step(
    run: Run,
    name: str,
    work: Callable[[str], Mapping[str, Any]],
    *,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    code: Sequence[str],
    resumable: bool = False,
) -> StepResult:
    """Do `work(folder)` unless the same work was committed before.

    Args:
        run: the walk that this step belongs to.
        name: the step; its outputs lie in `workspace/steps/name/<key>`.
        work: fills the folder it is given and returns JSON metadata for the manifest.
        settings: the part of the configuration that the result depends on.
        inputs: name -> what identifies the contents of each input.
        code: folders whose sources the result depends on.
        resumable: `work` continues from what an interrupted attempt left in the folder; otherwise that is removed.
    """
    log = get_logger(name)
    uri = step_folder(run.config.workspace, name, settings=settings, inputs=inputs, code=code)
    done = None if run.fresh else storage.read_manifest(uri)
    if done is None:
        if run.fresh or not resumable:
            storage.remove(uri)
        log.info("started", output=uri)
        start = time.monotonic()
        metadata = {**work(uri), "seconds": round(time.monotonic() - start, 2)}
        storage.commit(uri, metadata)
        result = StepResult(name, uri, False, metadata["seconds"], metadata)
        log.info("finished", seconds=result.seconds)
    else:
        result = StepResult(name, uri, True, float(done.metadata["seconds"]), done.metadata)
        log.info("skipped: finished before with the same inputs, settings and code", took=f"{result.seconds}s", output=uri)
    remember(run, result)
    return result


def remember(run: Run, result: StepResult) -> None:
    """Make a step the one of its name in a run."""
    _save(run, f"{result.name}{_STEP}", asdict(result))


def run_records(workspace: str, run_id: str) -> dict[str, StepResult]:
    """The steps of a run by name, in the order in which they were recorded."""
    return {record["name"]: StepResult(**record) for record in _saved(workspace, run_id, _STEP)}


def remember_run(workspace: str, run_id: str) -> None:
    """Make a run the one that commands go on from."""
    storage.write_json(storage.join(workspace, "runs", _LATEST), {"run_id": run_id})


def latest_run(workspace: str) -> tuple[str, dict[str, StepResult]]:
    """Id and steps of the last finished run.

    Raises:
        RankGRError: there is none.
    """
    uri = storage.join(workspace, "runs", _LATEST)
    if not storage.exists(uri):
        raise RankGRError("no run has finished in this workspace", where=workspace, mend="rankgr quickstart, or rankgr run")
    run_id = str(storage.read_json(uri)["run_id"])
    return run_id, run_records(workspace, run_id)


@contextmanager
def error_kept(run: Run, step: str) -> Iterator[None]:
    """Leave an error of ours in the run's records, for `raise_kept_error`; what the step left in an earlier attempt is forgotten."""
    forget_errors(run, step)
    try:
        yield
    except RankGRError as error:
        keep_error(run, step, error)
        raise


def keep_error(run: Run, step: str, error: RankGRError) -> None:
    """Leave a step's error in the run's records, for `raise_kept_error`."""
    with suppress(errors.StorageError):  # the storage may be what failed
        _save(run, f"{step}{_ERROR}", {**errors.describe(error), "step": step})


def forget_errors(run: Run, step: str = "") -> None:
    """Remove the errors that steps of a run left, or the one of a step: another attempt begins."""
    folder = storage.join(run.config.workspace, "runs", run.run_id)
    for name in [f"{step}{_ERROR}"] if step else storage.list_files(folder, _ERROR):
        storage.remove(storage.join(folder, name))


def raise_kept_error(workspace: str, run_id: str, step: str = "") -> None:
    """Raise the error that a run left behind, if any: a step's, or the first one with a note of what failed beside it."""
    kept = [error for error in _saved(workspace, run_id, _ERROR) if step in ("", error["step"])]
    if kept:
        errors.raise_described(kept[0], [f"{error['step']} failed too: {error['what']}" for error in kept[1:]])


def _save(run: Run, name: str, record: Mapping[str, Any]) -> None:
    storage.write_json(storage.join(run.config.workspace, "runs", run.run_id, name), {**record, _RECORDED: time.time_ns()})


def _saved(workspace: str, run_id: str, kind: str) -> list[dict[str, Any]]:
    """Records of a run in the order in which they were written."""
    folder = storage.join(workspace, "runs", run_id)
    saved = [storage.read_json(storage.join(folder, name)) for name in storage.list_files(folder, kind)] if storage.exists(folder) else []
    saved.sort(key=lambda record: int(record.pop(_RECORDED)))
    return saved


def job_main(step: Callable[..., StepResult], inputs: Sequence[str]) -> None:
    """Command line of a step, as `python -m components.<room>.job` and `ray job submit` run it.

    Args:
        step: called with a `Run` and one URI for each input; parameters that are true or false become options too.
        inputs: their names, which become options.
    """
    flags = [name for name, parameter in inspect.signature(step).parameters.items() if isinstance(parameter.default, bool)]
    parser = argparse.ArgumentParser(description=(sys.modules["__main__"].__doc__ or "").strip())
    parser.add_argument("--config", help="YAML or JSON file with settings, local or s3://")
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting; may be repeated")
    parser.add_argument("--run-id", default="manual", help="where the step's record goes: workspace/runs/RUN_ID")
    parser.add_argument("--fresh", action="store_true", help="redo the step even if it is finished")
    for name in inputs:
        parser.add_argument(f"--{name}", required=True, metavar="URI", help=f"folder that the step {name} wrote")
    for name in flags:
        parser.add_argument(f"--{name.replace('_', '-')}", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    configure_logs()
    # What Ray sends to its workers they find by the name of its module, and `__main__` is another one there.
    main = sys.modules["__main__"].__spec__
    if main is not None and step.__module__ == "__main__":
        step = getattr(importlib.import_module(main.name), step.__name__)
    try:
        config = load_config(options["config"], preset=options["preset"], overrides=options["set"])
        run = Run(config, options["run_id"], options["fresh"])
        with error_kept(run, name_of(step)):
            result = step(run, **{name: options[name] for name in (*inputs, *flags) if name in options})
    except RankGRError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    sys.stdout.write(f"{result.uri}\n")
