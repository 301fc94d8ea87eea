"""What can be set: everything else is refused, and what is made from values.yaml is up to date."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from infra.config import Config, load_config
from infra.image import IMAGE
from tests.chart.generate import CHART, OF_THE_CHART, documented, files, schema
from tests.chart.rendered import CI, ci_values, refusal

DEFAULTS = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
SCHEMA = jsonschema_rs.validator_for(schema())


@pytest.mark.parametrize(("path", "text"), list(files()), ids=lambda one: one.name if isinstance(one, Path) else "")
def test_what_is_made_is_up_to_date(path: Path, text: str) -> None:
    assert path.read_text("utf-8") == text, "make chart-files"


def test_every_value_has_a_meaning_of_its_own_or_its_sections() -> None:
    meanings = {one.path: one.meaning for one in documented()}
    for path in meanings:
        assert any(meanings[path[:depth]] for depth in range(len(path), 0, -1)), path


def mappings(node: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where mappings are, the top among them."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    own = [path] if isinstance(node, dict) else []
    return own + [found for key, value in inner for found in mappings(value, (*path, key))]


FREE = ("labels", "nodeSelector", "annotations", "namespaceLabels", "podLabels")
"""Mappings whose keys are the user's own."""


@pytest.mark.parametrize("name", ["defaults", *CI])
def test_a_misspelt_key_is_refused_at_every_depth(name: str) -> None:
    values = DEFAULTS if name == "defaults" else ci_values(name)
    assert SCHEMA.is_valid(values)
    places = [path for path in mappings(values) if not (path and path[-1] in FREE)]
    assert len(places) > 10
    for path in places:
        changed = copy.deepcopy(values)
        node = changed
        for key in path:
            node = node[key]
        node["misspelt"] = "x"
        assert not SCHEMA.is_valid(changed), path


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"servin": {}}, "servin"),
        ({"serving": {"workers": {"mim": 2}}}, "mim"),
        ({"redis": {"resources": {"limits": {"cpus": 1}}}}, "cpus"),
        ({"config": {"training": {"epoch": 3}}}, "epoch"),
        ({"networkPolicy": {"clients": [{"namespace": "shop"}]}}, "namespace"),
        ({"redis": {"external": {"url": "redis://:hunter2@redis:6379/0"}}}, "url"),
    ],
)
def test_helm_names_the_key_that_it_refuses(values: dict[str, Any], where: str) -> None:
    assert where in refusal(values)


def test_settings_that_the_chart_makes_cannot_be_set_twice() -> None:
    for section, keys in OF_THE_CHART.items():
        for key in keys:
            assert key in type(getattr(Config(), section)).model_fields
            assert not SCHEMA.is_valid({"config": {"workspace": "s3://b", section: {key: None}}}), f"{section}.{key}"


@pytest.mark.parametrize("name", CI)
def test_the_settings_of_every_values_file_are_rankgrs(name: str, tmp_path: Path) -> None:
    file, settings = tmp_path / "run.yaml", ci_values(name)["config"]
    file.write_text(json.dumps(settings), "utf-8")
    assert load_config(str(file)).workspace == settings["workspace"]  # a key that is not known would be refused


def test_the_image_is_the_one_that_pipelines_name() -> None:
    repository, tag = IMAGE.rsplit(":", 1)
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    assert (DEFAULTS["image"]["train"]["repository"], f"{chart['appVersion']}-python3.11") == (repository, tag)
