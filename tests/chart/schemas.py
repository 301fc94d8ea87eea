"""Kubernetes' and KubeRay's schemas, as strict as the API server's field validation: unknown fields are refused."""

from __future__ import annotations

import json
import os
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from tests.chart.rendered import Document, documents_of
from tests.chart.tools import SCHEMAS

KUBERNETES = tuple(f"1.{minor}" for minor in range(29, 36))
_KEPT = ("x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields")


@cache
def _definitions(version: str) -> dict[str, Any]:
    if not SCHEMAS.exists():
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail("the schemas of Kubernetes are not here: make chart")
        pytest.skip("the schemas of Kubernetes are not here: make chart")
    with zipfile.ZipFile(SCHEMAS) as wheel:
        path = f"kubernetes_validate/kubernetes-json-schema/v{version}.0-local-strict/_definitions.json"
        return dict(json.loads(wheel.read(path))["$defs"])


@cache
def _kinds(version: str) -> dict[tuple[str, str], str]:
    kinds = {}
    for name, definition in _definitions(version).items():
        for one in definition.get("x-kubernetes-group-version-kind", []):
            kinds["/".join(filter(None, (one["group"], one["version"]))), one["kind"]] = name
    return kinds


@cache
def _validator(version: str, api: str, kind: str) -> Any:
    name = _kinds(version).get((api, kind))
    return name and jsonschema_rs.validator_for({"$ref": f"#/$defs/{name}", "$defs": _definitions(version)})


def is_of_kubernetes(document: Document, version: str) -> bool:
    """Whether the API of this version has the kind."""
    return (document["apiVersion"], document["kind"]) in _kinds(version)


def errors(document: Document, version: str) -> list[str]:
    """What is wrong with an object by the API of a version."""
    return _told(_validator(version, document["apiVersion"], document["kind"]), document)


def crd_errors(document: Document, folder: Path) -> list[str]:
    """What is wrong with an object by the CRDs of a folder; their rules in CEL are not evaluated."""
    return _told(_crds(folder)[document["apiVersion"], document["kind"]], document)


def _told(validator: Any, document: Document) -> list[str]:
    return [f"{'.'.join(map(str, error.instance_path))}: {error.message[:200]}" for error in validator.iter_errors(document)]


@cache
def _crds(folder: Path) -> dict[tuple[str, str], Any]:
    validators = {}
    for file in folder.glob("*.yaml"):
        [crd] = documents_of(file.read_text("utf-8"))
        for version in crd["spec"]["versions"]:
            if version["name"] == "v1":
                schema = _closed(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                validators[f"{crd['spec']['group']}/v1", crd["spec"]["names"]["kind"]] = jsonschema_rs.validator_for(schema)
    return validators


def _closed(schema: Any) -> Any:
    """A CRD's structural schema as JSON schema, in which a field that is not named is an error."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    told = {
        k: v for k, v in schema.items() if k not in ("default", "format", "nullable") and (not k.startswith("x-kubernetes-") or k in _KEPT)
    }
    if "properties" in told:
        told["properties"] = {key: _closed(inner) for key, inner in told["properties"].items()}
        if not told.get("x-kubernetes-preserve-unknown-fields"):
            told.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if key in told:
            told[key] = _closed(told[key])
    if schema.get("nullable") and isinstance(told.get("type"), str):
        told["type"] = [told["type"], "null"]
    return told
