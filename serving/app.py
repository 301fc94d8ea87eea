"""The serving application on Ray Serve: one ingress that reads slates, and model replicas that make fresh ones."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import httpx

from components.precompute.job import Loader, load_bundle
from infra.cluster import quiet_ray
from infra.config import Config
from infra.errors import ServiceError
from infra.local import free_port, require_port
from infra.logs import get_logger
from serving.auth import token_digests
from serving.flights import Outcome, SlateRequest
from serving.ingress import Ingress
from serving.precompute import Precompute

APP, MODEL, INGRESS = "rankgr", "Precompute", "Ingress"
_READY_S, _SHOW_S = 180.0, 30.0
_CODE_VERSION = "1"
LOGGING = {"log_level": "WARNING", "enable_access_log": False}
_REPLICA_CPUS = 0.1  # logical: replicas sleep most of the time and must fit beside a pipeline


def build_app(
    config: Config,
    bundle_uri: str | None,
    redis_url: str,
    *,
    version: str = "",
    loader: Loader = load_bundle,
    held: Mapping[str, str] | None = None,
) -> Any:
    """The Ray Serve application.

    Args:
        config: `serving`, `decoding`, `retriever` and `slate_store` are used.
        bundle_uri: the served bundle; None: slates and the fallback come from the store alone, and none are computed.
        redis_url: the slate store.
        version: the bundle's version, shown with the fallback in memory.
        loader: how a model replica loads the bundle.
        held: URI and version of each bundle that model replicas hold; by default the served one.
    """
    from ray import serve

    settings, config_json = config.serving, config.to_json()
    options = {"num_cpus": _REPLICA_CPUS}
    model = None
    if bundle_uri is not None:
        model = _in_place(
            serve.deployment(
                Precompute,
                name=MODEL,
                ray_actor_options=options,
                max_ongoing_requests=4 * config.decoding.users_per_batch,
                max_queued_requests=settings.max_pending,
                autoscaling_config={
                    "min_replicas": settings.precompute_min_replicas,
                    "max_replicas": max(settings.precompute_min_replicas, settings.precompute_max_replicas),
                    "target_ongoing_requests": 2 * config.decoding.users_per_batch,
                },
                user_config=dict(held or {bundle_uri: version}),
            )
        ).bind(config_json, redis_url, loader)
    # Without a `user_config`: a replica that takes a new one counts as not running, and HAProxy would be restarted without it.
    return _in_place(
        serve.deployment(
            serve.ingress()(Ingress),
            name=INGRESS,
            num_replicas=settings.retrieval_replicas,
            ray_actor_options=options,
            max_ongoing_requests=1000,
        )
    ).bind(config_json, redis_url, model, token_digests(settings), bundle_uri or "", version)


def _in_place(deployment: Any) -> Any:
    """Keep the replicas where only `user_config` changes: without a code version of ours, Serve makes one up for each deploy."""
    return deployment.options(version=_CODE_VERSION, _internal=True)


class LiveService:
    """The running application, as `serving.sync` sees it.

    Args:
        config: as the application was started with, like the other arguments.
        redis_url: the slate store.
        loader: how a model replica loads a bundle.
    """

    def __init__(self, config: Config, redis_url: str, *, loader: Loader = load_bundle) -> None:
        self.config, self.redis_url, self.loader = config, redis_url, loader

    @cached_property
    def _model(self) -> Any:
        return _handle(MODEL)

    @cached_property
    def _ingress(self) -> Any:
        return _handle(INGRESS)

    def close(self) -> None:
        """Let the handles' threads go; they would look for a cluster when this one has ended."""
        for handle in {"_model", "_ingress"} & self.__dict__.keys():
            self.__dict__[handle].shutdown()

    def hold(self, bundles: Mapping[str, str]) -> None:
        """Change which bundles the model replicas hold, in place; returns when all of them have seen it."""
        from ray import serve

        uri, version = next(iter(bundles.items()))
        app = build_app(self.config, uri, self.redis_url, version=version, loader=self.loader, held=bundles)
        serve.run_many([serve.RunTarget(app, name=APP, route_prefix="/", logging_config=LOGGING)])

    def show(self, bundle_uri: str, version: str) -> None:
        """Have all ingress replicas show the items of a bundle; one that has no answer shows those of before."""
        try:
            self._ingress.broadcast("show", bundle_uri, version).results(timeout_s=_SHOW_S)
        except Exception as error:  # none is there, or one hangs
            reason = (str(error).splitlines() or [repr(error)])[0]
            get_logger("sync").warning("an ingress replica does not know yet what is served", version=version, reason=reason)

    def compute(self, requests: Sequence[SlateRequest]) -> list[Outcome]:
        """Have slates computed and stored; returns for each what became of it."""
        size = self.config.decoding.users_per_batch
        batches = [list(requests[start : start + size]) for start in range(0, len(requests), size)]
        answers = [self._model.refresh.remote(batch) for batch in batches]
        return [outcome for batch, answer in zip(batches, answers, strict=True) for outcome in self._outcomes(answer, batch)]

    def _outcomes(self, answer: Any, batch: Sequence[SlateRequest]) -> list[Outcome]:
        try:
            outcomes: list[Outcome] = answer.result(timeout_s=max(batch[0].deadline - time.time(), 0.0))
        except Exception as error:  # of this batch, or of a replica that died: the others go on
            reason = (str(error).splitlines() or [repr(error)])[0]
            get_logger("sync").warning("slates could not be computed", users=len(batch), reason=reason)
            return ["failed"] * len(batch)
        return outcomes


def _handle(deployment: str) -> Any:
    """Of a deployment; its router runs beside the caller's thread, which has no event loop, in every mode of Serve."""
    from ray import serve

    handle = serve.get_deployment_handle(deployment, APP)
    handle._init(_run_router_in_separate_loop=True)
    return handle


@contextmanager
def start(
    config: Config,
    bundle_uri: str | None,
    redis_url: str,
    *,
    version: str = "",
    loader: Loader = load_bundle,
    ends_with_cluster: bool = False,
) -> Iterator[str]:
    """Run the application on the Ray cluster of this process; yields its base URL once it answers.

    Args:
        config: as for `build_app`.
        bundle_uri: as for `build_app`.
        redis_url: as for `build_app`.
        version: as for `build_app`.
        loader: as for `build_app`.
        ends_with_cluster: do not wait for replicas to leave one by one, since the caller ends the whole cluster.

    Raises:
        ConfigError: the host is not the loopback interface and no token is configured.
        ServiceError: the port is taken, or the application does not become ready.
    """
    from ray import serve

    host, port = config.serving.host, config.serving.port
    token_digests(config.serving)  # what is wrong with them is said before Ray is asked for anything
    if port:
        require_port(host, port, setting="serving.port")
    port = port or free_port(host)
    quiet_ray()
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=LOGGING)
    try:
        app = build_app(config, bundle_uri, redis_url, version=version, loader=loader)
        serve.run_many(
            [serve.RunTarget(app, name=APP, route_prefix="/", logging_config=LOGGING)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        url = f"http://{_reachable(host)}:{port}"
        _wait_until_ready(url)
        get_logger("serving").info("answering", url=url, docs=f"{url}/docs")
        yield url
    finally:
        if not ends_with_cluster:
            serve.shutdown()


def _wait_until_ready(url: str) -> None:
    from ray import serve

    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        app = serve.status().applications[APP]
        if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reasons = [one.message for one in app.deployments.values() if one.message] or [app.message]
            raise ServiceError(
                f"the application does not start: {' '.join(reasons)}", where=url, mend="see the message; the bundle may be damaged"
            )
        if app.status == "RUNNING":
            try:
                if httpx.get(f"{url}/healthz", timeout=1.0).is_success:
                    return
            except httpx.TransportError:
                pass  # the proxy is still coming up
        time.sleep(0.1)
    raise ServiceError(
        f"the application is not ready after {_READY_S:.0f} s", where=url, mend="free CPU slots of the cluster (cluster.cpus)"
    )


def _reachable(host: str) -> str:
    """The address under which this machine reaches a server bound to `host`."""
    return "127.0.0.1" if host in ("0.0.0.0", "") else host  # noqa: S104 - compared, not bound
