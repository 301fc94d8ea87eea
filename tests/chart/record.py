"""Keep what a version's values give, for the tests of upgrades: `python -m tests.chart.record` once the version is released."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.chart.generate import CHART
from tests.chart.rendered import CI, Document, ci_values, label, render

PREVIOUS = Path(__file__).parent / "previous"
_FIXED = {
    "Deployment": ("selector",),
    "StatefulSet": ("selector", "serviceName", "volumeClaimTemplates", "podManagementPolicy"),
    "PersistentVolumeClaim": ("accessModes", "storageClassName"),
    "Service": ("clusterIP",),
}


def immutable(documents: list[Document]) -> dict[str, Any]:
    """The fields that Kubernetes does not let an upgrade change, by object."""
    return {label(one): {key: one["spec"].get(key) for key in _FIXED[one["kind"]]} for one in documents if one["kind"] in _FIXED}


def main() -> None:
    """Write the file of the chart's present version."""
    version = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))["version"]
    kept = {name: {"values": ci_values(name), "immutable": immutable(render(ci_values(name)))} for name in CI}
    (PREVIOUS / f"{version}.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
