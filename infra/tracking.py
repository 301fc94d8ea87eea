"""MLflow: one run for each released model, a registry of bundles, the alias of the champion."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infra import storage
from infra.credentials import without_password
from infra.errors import DataError, ServiceError
from infra.local import mlflow_uri
from infra.service_sections import TrackingConfig

CHAMPION = "champion"
CHALLENGER = "challenger"
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # no such model, no such alias
_BUNDLE, _EVALUATION, _PROMOTED, _ORIGIN = "bundle_uri", "evaluation", "promoted_ms", "rankgr."


@dataclass(frozen=True)
class Registered:
    """A version in the registry.

    Attributes:
        number: MLflow's version number.
        bundle_uri: where its bundle lies.
        evaluation: content hash of the evaluation that it was judged by.
        report: that evaluation's report; empty if it is gone.
        origin: `run_id` and the folders of the steps that it came from, `sessions` among them; those of the version that it began
            as where it got more items or went on learning. Empty where it was registered without.
    """

    number: str
    bundle_uri: str
    evaluation: str
    report: dict[str, Any]
    origin: dict[str, str]


@dataclass(frozen=True)
class Entry:
    """A line of the registry.

    Attributes:
        number: MLflow's version number.
        bundle_uri: where its bundle lies.
        created_ms: when it was registered, milliseconds since the epoch.
        promoted_ms: when it last became champion; 0 if it never did.
        is_champion: it has the alias now.
    """

    number: str
    bundle_uri: str
    created_ms: int
    promoted_ms: int
    is_champion: bool


class Registry:
    """Models in MLflow.

    Args:
        config: tracking server and names; an empty `uri` is SQLite in the workspace.
        workspace: of the run.
    """

    def __init__(self, config: TrackingConfig, workspace: str) -> None:
        self.config = config
        self.uri = config.uri or mlflow_uri(workspace)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # MLflow's own 7 last four minutes
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            from mlflow import MlflowClient

            if self.uri.startswith("sqlite:///"):
                Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its database layer warns about itself
                self.client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
                self.client.search_experiments(max_results=1)
        except Exception as error:
            raise _unreachable(self.uri, error) from error

    @property
    def address(self) -> str:
        """`uri` as it may be shown: without a password."""
        return _shown(self.uri)

    def require_champion(self) -> Registered:
        """The champion, for what cannot go on without one.

        Raises:
            DataError: there is none, or it has no bundle.
            ServiceError: MLflow did not answer.
        """
        champion = self.champion()
        if champion is None:
            mend = "rankgr quickstart, or rankgr run; or set tracking.uri as the run did that released one"
            raise DataError("there is no champion yet", where=self.address, mend=mend)
        if not champion.bundle_uri:
            mend = f"give the alias {CHAMPION} to a version that RankGR registered"
            raise DataError(f"the champion, version {champion.number}, names no bundle", where=self.address, mend=mend)
        return champion

    def champion(self) -> Registered | None:
        """The version with the alias `champion`, if there is one.

        Raises:
            ServiceError: MLflow did not answer. A gate that took that for "no champion" would let anything through.
        """
        from mlflow.exceptions import MlflowException

        try:
            version = self.client.get_model_version_by_alias(self.config.model_name, CHAMPION)
        except MlflowException as error:
            if error.error_code in _NOT_THERE:
                return None
            raise _unreachable(self.uri, error) from error
        uri = version.tags.get(_BUNDLE, "")
        manifest = storage.read_manifest(uri) if uri else None
        report = manifest.metadata.get("report", {}) if manifest else {}
        origin = {key.removeprefix(_ORIGIN): value for key, value in version.tags.items() if key.startswith(_ORIGIN)}
        return Registered(str(version.version), uri, version.tags.get(_EVALUATION, ""), dict(report), origin)

    def register(
        self,
        bundle_uri: str,
        *,
        evaluation: str,
        metrics: Mapping[str, float],
        params: Mapping[str, str],
        files: Mapping[str, str],
        origin: Mapping[str, str] | None = None,
    ) -> str:
        """Log a run and register a bundle as a new version; returns the version's number.

        Args:
            metrics: logged in one batch.
            params: logged in one batch.
            files: artifact name -> text.
            origin: what it came from, as tags `rankgr.<name>` of the run, by which MLflow finds it, and of the version.
        """
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        name = self.config.model_name
        with _mlflow_errors(self.uri), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow warns about its own future defaults
            came_from = {f"{_ORIGIN}{key}": value for key, value in (origin or {}).items()}
            run = self.client.create_run(self._experiment(), tags=came_from)
            batch = [Metric(key.replace("@", "_at_"), value, 0, 0) for key, value in metrics.items()]
            self.client.log_batch(run.info.run_id, metrics=batch, params=[Param(k, v[:6000]) for k, v in params.items()])
            for path, text in files.items():
                self.client.log_text(run.info.run_id, text, path)
            try:
                self.client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            version = self.client.create_model_version(
                name, source=bundle_uri, run_id=run.info.run_id, tags={_BUNDLE: bundle_uri, _EVALUATION: evaluation, **came_from}
            )
            self.client.set_terminated(run.info.run_id)
        return str(version.version)

    def has(self, number: str, bundle_uri: str) -> bool:
        """Whether a version is there and is the one of a bundle."""
        from mlflow.exceptions import MlflowException

        try:
            version = self.client.get_model_version(self.config.model_name, number)
        except MlflowException as error:
            if error.error_code in _NOT_THERE:
                return False
            raise _unreachable(self.uri, error) from error
        return bool(version.tags.get(_BUNDLE) == bundle_uri)

    def run_of(self, number: str) -> str:
        """Id of the MLflow run that a version came from."""
        with _mlflow_errors(self.uri):
            return str(self.client.get_model_version(self.config.model_name, number).run_id)

    def page_of(self, number: str) -> str:
        """Address of the page on which a server shows the MLflow run of a version, without what the server is entered with.

        Empty where there is no server.
        """
        parts = urlsplit(self.uri)
        if parts.scheme not in ("http", "https"):
            return ""
        run = self.run_of(number)
        with _mlflow_errors(self.uri):
            experiment = self.client.get_run(run).info.experiment_id
        server = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/"), query="", fragment="")
        return f"{server.geturl()}/#/experiments/{experiment}/runs/{run}"

    def promote(self, number: str) -> None:
        """Give a version the alias `champion`."""
        name = self.config.model_name
        with _mlflow_errors(self.uri):
            self.client.set_model_version_tag(name, number, _PROMOTED, str(time.time_ns() // 1_000_000))
            self.client.set_registered_model_alias(name, CHAMPION, number)

    def entries(self) -> list[Entry]:
        """All versions, the newest first."""
        with _mlflow_errors(self.uri):
            found = self.client.search_model_versions(f"name = '{self.config.model_name}'")
        champion = self.champion()
        entries = [
            Entry(
                number=str(one.version),
                bundle_uri=one.tags.get(_BUNDLE, ""),
                created_ms=int(one.creation_timestamp),
                promoted_ms=int(one.tags.get(_PROMOTED, 0)),
                is_champion=champion is not None and champion.number == str(one.version),
            )
            for one in found
        ]
        return sorted(entries, key=lambda entry: -int(entry.number))

    def _experiment(self) -> str:
        existing = self.client.get_experiment_by_name(self.config.experiment)
        if existing is not None:
            return str(existing.experiment_id)
        artifacts = None
        if self.uri.startswith("sqlite:///"):
            artifacts = (Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
        return str(self.client.create_experiment(self.config.experiment, artifact_location=artifacts))


@contextmanager
def _mlflow_errors(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise _unreachable(uri, error) from error


def _shown(uri: str) -> str:
    """An address without its password; one that has none stays as it is, since taking SQLite's apart loses slashes."""
    return without_password(uri) if urlsplit(uri).netloc.rpartition("@")[0] else uri


def _unreachable(uri: str, error: Exception) -> ServiceError:
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    parts = urlsplit(uri)
    entered_with = parts.netloc.rpartition("@")[0]
    for secret in (f"{entered_with}@" if entered_with else "", parts.password or ""):  # clients quote the address
        first_line = first_line.replace(secret, "") if secret else first_line
    return ServiceError(f"MLflow cannot be reached: {first_line}", where=_shown(uri), mend="check tracking.uri")
