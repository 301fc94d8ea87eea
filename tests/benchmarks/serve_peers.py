"""The peer of `tests.benchmarks.serve`: the least that Ray Serve can do with one Redis GET a request."""

from __future__ import annotations

from typing import Any

import redis.asyncio
from starlette.requests import Request
from starlette.responses import Response

NAME = "echo"


class Echo:
    """Answers with the stored bytes of a user's slate, as they are.

    Args:
        redis_url: where they are.
        prefix: of the keys.
    """

    def __init__(self, redis_url: str, prefix: str) -> None:
        self._redis: Any = redis.asyncio.Redis.from_url(redis_url)
        self._prefix = prefix

    async def __call__(self, request: Request) -> Response:
        """GET /echo/{user_id}."""
        return Response(await self._redis.get(self._prefix + request.url.path.rpartition("/")[2]))


def run_echo(base_url: str, redis_url: str, prefix: str, replicas: int) -> str:
    """Run it beside the application, with as many replicas; returns its URL."""
    from ray import serve

    options = {"num_cpus": 0.1}
    deployment = serve.deployment(Echo, name="Echo", num_replicas=replicas, ray_actor_options=options, max_ongoing_requests=1000)
    app = deployment.bind(redis_url, prefix)
    logging: Any = {"log_level": "WARNING", "enable_access_log": False}
    serve.run_many([serve.RunTarget(app, name=NAME, route_prefix=f"/{NAME}", logging_config=logging)])
    return f"{base_url}/{NAME}"
