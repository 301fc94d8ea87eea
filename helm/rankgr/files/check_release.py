"""`helm test`: Redis lets RankGR in and keeps it to its own keys, MLflow answers, the service answers and asks for a token."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import httpx
import redis

_TIMEOUT_S = 10


def redis_keeps_to_its_rules() -> None:
    """A key below the prefix can be written; one that is not cannot, where the Redis has rules of the chart's."""
    ca = {"ssl_ca_certs": "/etc/rankgr-redis/ca.crt"} if os.path.exists("/etc/rankgr-redis/ca.crt") else {}
    user = os.environ.get("RANKGR_REDIS_USERNAME") or None
    password = os.environ["RANKGR_REDIS_PASSWORD"]
    with redis.Redis.from_url(os.environ["RANKGR_REDIS_URL"], username=user, password=password, socket_timeout=_TIMEOUT_S, **ca) as client:
        key = f"{os.environ['KEY_PREFIX']}:helm-test"
        client.set(key, "1", ex=60)
        assert client.get(key) == b"1", "what was written is not there"
        try:
            client.get("another-tenants:key")
        except redis.exceptions.NoPermissionError:
            return
        sys.stdout.write("note: this Redis lets RankGR read keys that are not its own\n")


def mlflow_answers() -> None:
    """Healthy, and by the name that pods call it."""
    uri = os.environ["MLFLOW"].rstrip("/")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    answer = httpx.post(f"{uri}/api/2.0/mlflow/experiments/search", json={"max_results": 1}, headers=headers, timeout=_TIMEOUT_S)
    assert answer.is_success, f"{answer.status_code} {answer.text[:200]}"


def service_answers() -> None:
    """Ready, a slate for a user nobody knows, and no event without a token."""
    with httpx.Client(base_url=os.environ["SERVICE"], timeout=_TIMEOUT_S) as client:
        ready = client.get("/readyz")
        assert ready.is_success, f"/readyz: {ready.status_code} {ready.text[:200]}"
        slate = client.get("/v1/users/helm-test/slate")
        assert slate.is_success, f"a slate: {slate.status_code} {slate.text[:200]}"
        assert slate.json()["items"], "a slate without items: were slates computed?"
        refused = client.post("/v1/events", json={"events": []})
        assert refused.status_code == 401, f"an event without a token was answered {refused.status_code}, not 401"


def main() -> int:
    """Do all checks that concern this release; returns how many failed."""
    checks: list[Callable[[], None]] = [redis_keeps_to_its_rules, mlflow_answers]
    if os.environ.get("SERVICE"):
        checks.append(service_answers)
    failed = 0
    for check in checks:
        try:
            check()
        except (AssertionError, httpx.HTTPError, redis.RedisError) as error:
            failed += 1
            sys.stdout.write(f"FAILED {check.__name__}: {error}\n")
        else:
            sys.stdout.write(f"ok     {check.__name__}\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
