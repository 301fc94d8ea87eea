"""What of the chart follows from something else: the schema and the README's table from values.yaml, copies from `infra`.

    python -m tests.chart.generate    # `make chart-files`

Helm reads nothing outside the chart's folder, hence the copies. A comment above a key of values.yaml is its meaning; a line `@schema {...}`
in it is merged into the JSON schema that the default value gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from infra.config import PRESETS, Config

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "rankgr"
COPIES = {"files/rules.yaml": "infra/prometheus/rules.yaml", "files/dashboards/serving.json": "infra/grafana/serving.json"}
OF_THE_CHART = {
    "cluster": ("address",),
    "serving": ("host", "port", "tokens", "retrieval_replicas"),
    "slate_store": ("url", "username", "password", "ca_file"),
    "streaming": ("metrics_host", "metrics_port"),
    "tracking": ("uri",),
}
"""Settings that follow from the chart's other values, so that `config` refuses them."""

_KEY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z][\w-]*):(?: .*)?$")
_STRING = {"type": "string"}
_QUANTITY = {"type": ["string", "integer"], "pattern": "^[0-9]+(\\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}


def _closed(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties, **more}


_LABELS = {"type": "object", "additionalProperties": _STRING}
_DEFINITIONS: dict[str, Any] = {
    "labels": _LABELS,
    "quantity": _QUANTITY,
    "resources": _closed(
        {
            name: _closed(
                {kind: {"$ref": "#/definitions/quantity"} for kind in ("cpu", "memory", "ephemeral-storage")}, required=["cpu", "memory"]
            )
            for name in ("requests", "limits")
        },
        required=["requests", "limits"],
    ),
    "tolerations": {
        "type": "array",
        "items": _closed(
            {
                "key": _STRING,
                "operator": {"enum": ["Exists", "Equal"]},
                "value": _STRING,
                "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
                "tolerationSeconds": {"type": "integer"},
            }
        ),
    },
    "peer": _closed({"namespaceLabels": _LABELS, "podLabels": _LABELS}, minProperties=1),
    "destination": _closed(
        {
            "cidr": {"type": "string", "pattern": "^[0-9a-fA-F.:]+/[0-9]+$"},
            "ports": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 1, "maximum": 65535}},
        },
        required=["cidr", "ports"],
    ),
    "env": _closed(
        {
            "name": {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
            "value": _STRING,
            "valueFrom": _closed({"secretKeyRef": _closed({"name": _STRING, "key": _STRING}, required=["name", "key"])}),
        },
        required=["name"],
    ),
}


@dataclass(frozen=True)
class Value:
    """A key of values.yaml.

    Attributes:
        path: keys from the top.
        default: what it holds.
        meaning: the comment above it, without its `@schema` lines.
        schema: those lines, merged.
    """

    path: tuple[str, ...]
    default: Any
    meaning: str
    schema: dict[str, Any]


def documented() -> list[Value]:
    """All keys of values.yaml in their order; what an annotated key holds is part of it."""
    text = (CHART / "values.yaml").read_text("utf-8")
    tree = yaml.safe_load(text)
    found: list[Value] = []
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            comment.append(line.lstrip("# ").rstrip())
            continue
        match = _KEY.match(line)
        if match:
            indent = len(match["indent"])
            path = [(at, key) for at, key in path if at < indent] + [(indent, match["key"])]
            keys = tuple(key for _, key in path)
            schema: dict[str, Any] = {}
            for note in comment:
                if note.startswith("@schema "):
                    schema |= json.loads(note.removeprefix("@schema "))
            meaning = " ".join(note for note in comment if note and not note.startswith("@schema "))
            if not any(keys[: len(one.path)] == one.path for one in found if one.schema.get("$ref")):
                found.append(Value(keys, _at(tree, keys), meaning, schema))
        comment = []
    return found


def _at(tree: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def schema() -> dict[str, Any]:
    """JSON schema of the values, closed at every depth."""
    root = _closed({})
    by_path: dict[tuple[str, ...], dict[str, Any]] = {(): root}
    for value in documented():
        node = _node(value)
        by_path[value.path] = node
        by_path[value.path[:-1]]["properties"][value.path[-1]] = node
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of the RankGR chart"}
    # Helm adds `global` for charts that have this one as a part.
    root["properties"]["global"] = {"type": "object"}
    return {**head, **root, "definitions": {**_DEFINITIONS, **_config_definitions()}}


def _node(value: Value) -> dict[str, Any]:
    if "$ref" in value.schema:
        return dict(value.schema)
    if isinstance(value.default, dict):
        return _closed({})
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    about = {"description": value.meaning} if value.meaning else {}
    return {"type": kinds[type(value.default)], **about, **value.schema}


def _config_definitions() -> dict[str, Any]:
    """The schema of RankGR's own settings, less what the chart sets."""
    model = Config.model_json_schema(ref_template="#/definitions/{model}")
    sections = model.pop("$defs")
    for section, keys in OF_THE_CHART.items():
        name = model["properties"][section]["$ref"].rpartition("/")[2] if "$ref" in model["properties"][section] else ""
        for key in keys:
            del sections[name]["properties"][key]
    model["properties"]["preset"] = {"enum": list(PRESETS), "description": "Settings to start from."}
    model["required"] = ["workspace"]
    return {"config": model, **sections}


def readme() -> str:
    """The chart's README: its text, and a table of all values."""
    rows = [(".".join(one.path), _shown(one), one.meaning) for one in documented()]
    template = jinja2.Environment(keep_trailing_newline=True, trim_blocks=True, autoescape=False)  # noqa: S701 - Markdown, and ours
    return template.from_string((CHART / "README.md.j2").read_text("utf-8")).render(rows=rows)


def _shown(value: Value) -> str:
    """The default as code; nothing for a section, whose keys follow."""
    is_section = isinstance(value.default, dict) and not value.schema
    return "" if is_section else f"`{json.dumps(value.default)}`".replace("|", "\\|")


def files() -> Iterator[tuple[Path, str]]:
    """Every file that is made, and what belongs into it."""
    yield CHART / "values.schema.json", json.dumps(schema(), indent=1) + "\n"
    yield CHART / "README.md", readme()
    for copy, original in COPIES.items():
        yield CHART / copy, (ROOT / original).read_text("utf-8")


def main() -> None:
    """Write them all."""
    for path, text in files():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
