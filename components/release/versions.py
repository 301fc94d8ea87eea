"""Versions that were released, and the way back to one of them: registry and slate store moved together."""

from __future__ import annotations

from dataclasses import dataclass

from infra import storage
from infra.errors import DataError
from infra.logs import get_logger
from infra.slate_store import SlateStore
from infra.tracking import Registry


@dataclass(frozen=True)
class Release:
    """A released version.

    Attributes:
        version: of the bundle, the one that slates carry; empty if the bundle is gone.
        number: MLflow's version number.
        bundle_uri: where the bundle lies.
        created_ms: when it was registered, milliseconds since the epoch.
        promoted_ms: when it last became champion; 0 if it never did.
        is_champion: the registry names it champion.
        is_active: readers see its slates.
        users: with slates when it was published; None: its slates are not there.
    """

    version: str
    number: str
    bundle_uri: str
    created_ms: int
    promoted_ms: int
    is_champion: bool
    is_active: bool
    users: int | None


def releases(registry: Registry, store: SlateStore) -> list[Release]:
    """All released versions, the newest first."""
    active, found = store.active_version(), []
    for entry in registry.entries():
        manifest = storage.read_manifest(entry.bundle_uri) if entry.bundle_uri else None
        version = manifest.digest[:12] if manifest else ""
        users = store.users(version) if version else None
        found.append(Release(version, **vars(entry), is_active=bool(version) and version == active, users=users))
    return found


def roll_back(registry: Registry, store: SlateStore, to: str = "") -> Release:
    """Make an earlier version the champion and show its slates again.

    Everything is checked before anything changes. The registry goes first: interrupted in between, readers keep the slates they
    had, and what watches the registry does not bring the newer version back. The same command again then finishes.

    Args:
        registry: names the champion.
        store: holds the slates.
        to: bundle version or MLflow number; empty: the one that was champion before the one that readers see.

    Returns:
        the version that is champion and active now.

    Raises:
        DataError: there is no such version, or its slates or its bundle are gone.
        IntegrityError: its bundle is damaged.
    """
    target = _target(releases(registry, store), to)
    where = f"{target.version} (MLflow {target.number})"
    storage.open_committed(target.bundle_uri)
    if target.users is None or store.count(target.version) < 0.5 * target.users:
        raise DataError(
            "the slates of this version are not in the store any more", where=where, mend="roll back to a later one, or release it anew"
        )
    registry.promote(target.number)
    store.activate(target.version)
    get_logger("release").info("rolled back", version=target.version, mlflow_version=target.number)
    return target


def _target(found: list[Release], to: str) -> Release:
    usable = [release for release in found if release.version]
    if to:
        matches = [release for release in usable if to in (release.version, release.number)]
        mend = "see `rankgr release list`"
    else:
        seen = [place for place, release in enumerate(usable) if release.is_active] or [
            place for place, release in enumerate(usable) if release.is_champion
        ]
        # By when they were champion last, not by number: what was rolled back from is not returned to.
        matches = sorted(usable[seen[0] + 1 :] if seen else [], key=lambda release: -release.promoted_ms)
        matches = [release for release in matches if release.promoted_ms]
        mend = "name one with --to, see `rankgr release list`"
    if not matches:
        raise DataError(f"there is no version {to}" if to else "no earlier version has been champion", mend=mend)
    return matches[0]
