"""`rankgr compile` and `rankgr submit`: the pipelines as files for a Kubeflow server, and runs of them."""

from __future__ import annotations

import json
import ssl
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import typer

from infra import storage
from infra.config import Config, read_settings
from infra.credentials import read_secret
from infra.errors import ConfigError, ServiceError
from pipelines.cli.common import ConfigFile, DryRun, Fresh, Items, Logs, Overrides, Preset
from pipelines.parameters import resolve

_REACH_S = 20.0
NAMES = ("training", "refresh")
Name = Literal["training", "refresh"]

Gpus = Annotated[int, typer.Option("--gpus", min=0, help="GPUs of a training step that does its work itself.")]
NodeSelector = Annotated[list[str] | None, typer.Option("--node-selector", metavar="LABEL=VALUE", help="Nodes of heavy steps.")]
Toleration = Annotated[list[str] | None, typer.Option("--toleration", metavar="KEY[=VALUE]:EFFECT", help="Taints that they bear.")]
Secret = Annotated[str, typer.Option("--secret", help="Kubernetes secret whose keys become environment variables; empty for none.")]
Retries = Annotated[int, typer.Option("--retries", min=0, help="Of a step, with back-off.")]


def compile_pipelines(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for training.yaml and refresh.yaml.")] = Path("pipelines/compiled"),
    gpus: Gpus = 0,
    node_selector: NodeSelector = None,
    toleration: Toleration = None,
    secret: Secret = "rankgr",  # noqa: S107 - a name
    retries: Retries = 3,
    dry_run: DryRun = False,
) -> None:
    """Compile the pipelines for a Kubeflow cluster.

    Example: `rankgr compile -o compiled --gpus 1 --node-selector pool=gpu --toleration nvidia.com/gpu:NoSchedule`
    """
    files = {name: output / f"{name}.yaml" for name in NAMES}
    options: dict[str, Any] = {"gpus": gpus, "secret": secret, "retries": retries, "tolerations": toleration or []}
    options["node_selector"] = _labels(node_selector or [])
    for name, file in files.items():
        if dry_run:
            sys.stdout.write(f"would write {file}\n")
            continue
        with storage.storage_errors(str(file)):
            file.parent.mkdir(parents=True, exist_ok=True)
            _compile(name, file, options)
        sys.stdout.write(f"{file}\n")


def submit(
    host: Annotated[str, typer.Option("--host", envvar="KFP_HOST", help="Address of Kubeflow Pipelines, https://...")],
    logs: Logs = None,
    items: Items = None,
    config: ConfigFile = None,
    preset: Preset = None,
    overrides: Overrides = None,
    pipeline: Annotated[Name, typer.Option("--pipeline", help="Which one.")] = "training",
    token: Annotated[str, typer.Option("--token", help="Bearer token as env:NAME or file:PATH; empty for none.")] = "",
    namespace: Annotated[str, typer.Option("--namespace", help="Of a multi-user installation.")] = "",
    experiment: Annotated[str, typer.Option("--experiment", help="Groups runs in the UI.")] = "rankgr",
    image: Annotated[str, typer.Option("--image", help="Container image of the steps; empty takes the compiled one.")] = "",
    ca_file: Annotated[str, typer.Option("--ca-file", help="Certificate authority of the server.")] = "",
    gpus: Gpus = 0,
    node_selector: NodeSelector = None,
    toleration: Toleration = None,
    secret: Secret = "rankgr",  # noqa: S107 - a name
    retries: Retries = 3,
    fresh: Fresh = False,
    wait: Annotated[bool, typer.Option("--wait", help="Until the run ends; a failed one is an error.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Check the parameters and start a run on a Kubeflow server.

    Example: `rankgr submit --host https://kubeflow.example.com/pipeline --token file:token --preset kuairand --logs s3://raw/events.parquet`
    """
    base = read_settings(config) if config else {}
    of_file = base.pop("preset", None)
    preset = preset or of_file or "small"
    named: dict[str, Any] = {"preset": preset, "logs_uri": logs or "", "items_uri": items or "", "overrides": overrides or []}
    named["config"] = json.dumps(base) if base else ""
    settings = resolve(**named, look=False)
    arguments = {**named, "fresh": fresh, **({"image": image} if image else {})}
    _refuse_local(settings)
    options: dict[str, Any] = {"gpus": gpus, "secret": secret, "retries": retries, "tolerations": toleration or []}
    options["node_selector"] = _labels(node_selector or [])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{pipeline}.yaml"
        _compile(pipeline, file, options)
        if dry_run:
            sys.stdout.write(f"would start {pipeline} on {host}, workspace {settings.workspace}\n")
            return
        _start(file, arguments, host=host, token=token, namespace=namespace, experiment=experiment, ca_file=ca_file, wait=wait)


def _refuse_local(settings: Config) -> None:
    """The steps of a cluster share neither this machine's folders nor each other's."""
    data, tracking = settings.data, settings.tracking.uri
    ways = {
        "--set workspace=s3://...": settings.workspace if storage.is_local(settings.workspace) else None,
        "--logs s3://...": (data.logs or "none") if storage.is_local(data.logs) else None,
        "--items s3://...": _local_or_none(data.items),
        "--set semantic_ids.earlier=s3://...": _local_or_none(settings.semantic_ids.earlier),
        "--set training.start_from=s3://...": _local_or_none(settings.training.start_from),
        "--set tracking.uri=https://...": None if tracking.startswith(("http://", "https://")) else tracking or "none",
    }
    local = {mend: where for mend, where in ways.items() if where is not None}
    if local:
        what = "the steps of a cluster share neither this machine's folders nor each other's"
        raise ConfigError(what, where=", ".join(local.values()), mend=" ".join(local))


def _local_or_none(uri: str) -> str | None:
    return uri if uri and storage.is_local(uri) else None


def _start(
    file: Path, arguments: dict[str, Any], *, host: str, token: str, namespace: str, experiment: str, ca_file: str, wait: bool
) -> None:
    from kfp import Client
    from kfp_server_api.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    bearer = read_secret(token, "--token") if token else None
    _require_server(host, bearer, ca_file)
    name = f"rankgr-{file.stem}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the client warns about its own names
            client = Client(host=host, existing_token=bearer, namespace=namespace or "kubeflow", ssl_ca_cert=ca_file or None)
            run = client.create_run_from_pipeline_package(
                str(file), arguments, run_name=name, experiment_name=experiment, namespace=namespace or None, enable_caching=False
            )
            sys.stdout.write(f"{run.run_id}\n")
            state = client.wait_for_run_completion(run.run_id, timeout=7 * 86_400).state if wait else "SUCCEEDED"
    except ApiException as error:
        raise ServiceError(f"Kubeflow refuses: {error.status} {error.reason}", where=host, mend="check --token and --namespace") from error
    except (HTTPError, OSError, ValueError) as error:
        raise ServiceError(f"Kubeflow cannot be reached: {str(error).splitlines()[0]}", where=host, mend="check --host") from error
    if state != "SUCCEEDED":
        raise ServiceError(f"the run ended {state}", where=f"{host}, run {run.run_id}", mend="see the outcome of the run in the UI")


def _require_server(host: str, bearer: str | None, ca_file: str) -> None:
    """Ask how the server is: the client itself would try for half a minute, and not say why it gives up."""
    headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
    try:
        verify = ssl.create_default_context(cafile=ca_file or None)
        answer = httpx.get(f"{host.rstrip('/')}/apis/v2beta1/healthz", headers=headers, verify=verify, timeout=_REACH_S)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise ServiceError(f"Kubeflow cannot be reached: {error}", where=host, mend="check --host and --ca-file") from error
    if not answer.is_success:  # a redirect leads to a page to log in
        what = f"Kubeflow refuses: {answer.status_code} {answer.reason_phrase}"
        raise ServiceError(what, where=host, mend="check --token, and that --host ends where its API begins")


def _compile(name: str, file: Path, options: dict[str, Any]) -> None:
    from kfp import compiler

    from pipelines.placement import Placement
    from pipelines.refresh import refresh_pipeline
    from pipelines.training import training_pipeline

    made = {"training": training_pipeline, "refresh": refresh_pipeline}[name](Placement(**options))
    compiler.Compiler().compile(made, str(file))


def _labels(texts: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    wrong = [label for label, equals, _ in pairs if not label or not equals]
    if wrong:
        raise ConfigError(f"cannot read the node selector {wrong[0]!r}", mend="write label=value")
    return {label: value for label, _, value in pairs}
