"""What containers run is there: programs, commands with their options, modules, scripts, and what they import, in the image they name."""

from __future__ import annotations

import importlib
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from pipelines.cli import app
from tests.chart.images import DOCKERFILES, Image, image_of, imports_in, imports_of, in_shell, instruction
from tests.chart.rendered import CI, EVERYTHING, Document, ci_values, pods, render

ALL = {"everything": EVERYTHING, **{name: ci_values(name) for name in CI}}
SYSTEM = {"/bin/sh", "sh", "sleep"}
"""Programs of the base image that are used."""


@dataclass(frozen=True)
class Command:
    """Something that is run.

    Attributes:
        where: for messages.
        words: program and arguments.
        image: in which; none: of others, of which only the scripts are known.
        scripts: path in the container -> text, of what ConfigMaps bring.
    """

    where: str
    words: tuple[str, ...]
    image: Image | None
    scripts: dict[str, str]


class NotThereError(Exception):
    """What would be run is not in the image."""


def require(condition: object, otherwise: str) -> None:
    if not condition:
        raise NotThereError(otherwise)


def tree(program: str) -> Any:
    """The commands of a program in the form of click."""
    if program == "rankgr":
        from typer.main import get_command

        return get_command(app)
    module = {"ray": "ray.scripts.scripts", "serve": "ray.serve.scripts"}[program]
    return importlib.import_module(module).cli


def parsed(command: Any, words: list[str]) -> Any:
    """The command at the end of a line, after its options were read as it would read them."""
    if not hasattr(command, "commands"):
        command.make_context(command.name, list(words))
        return command
    context = command.context_class(command, info_name=command.name)
    _, rest, _ = command.make_parser(context).parse_args(list(words))
    if not rest:
        require(command.invoke_without_command or "--help" in words, f"{command.name}: no subcommand")
        return command
    require(rest[0] in command.commands, f"{command.name} has no {rest[0]}")
    return parsed(command.commands[rest[0]], rest[1:])


def imports(command: Command) -> list[str]:
    """What a command imports, after a look whether it is there.

    Raises:
        NotThereError: it is not; other exceptions come from click and name an option.
    """
    program, *arguments = command.words
    folders = {os.path.dirname(path) for path in command.scripts}
    for word in arguments:
        require(word in command.scripts or os.path.dirname(word) not in folders, f"no ConfigMap brings {word}")
    if program in SYSTEM or command.image is None:
        return []
    require(program in command.image.programs, f"{program} is no program of the image")
    if program == "python":
        return _of_python(command.image, command.scripts, arguments)
    if program == "mlflow":  # whose own test reads its options
        return []
    last = parsed(tree(program), arguments)
    if program != "rankgr":
        return []
    return imports_of(last.callback) if last.callback else ["import pipelines.cli"]


def _of_python(image: Image, scripts: dict[str, str], arguments: list[str]) -> list[str]:
    if arguments[0] == "-c":
        return imports_in(arguments[1])
    if arguments[0] == "-m":
        require(image.has_module(arguments[1]), f"the image has no module {arguments[1]}")
        return [f"import {arguments[1]}"]
    require(arguments[0] in scripts, f"{arguments[0]} is no script")
    return imports_in(scripts[arguments[0]])


def brought(documents: list[Document], container: dict[str, Any], spec: dict[str, Any]) -> dict[str, str]:
    """Files that ConfigMaps bring into a container."""
    maps = {one["metadata"]["name"]: one["data"] for one in documents if one["kind"] == "ConfigMap"}
    volumes = {one["name"]: one["configMap"]["name"] for one in spec["volumes"] if "configMap" in one}
    mounts = {one["mountPath"]: maps[volumes[one["name"]]] for one in container["volumeMounts"] if one["name"] in volumes}
    return {f"{folder}/{key}": text for folder, data in mounts.items() for key, text in data.items()}


def hooks(container: dict[str, Any]) -> Iterator[list[str]]:
    """Commands of probes, and before the end."""
    places = [container.get(f"{kind}Probe", {}) for kind in ("startup", "liveness", "readiness")]
    places += container.get("lifecycle", {}).values()
    yield from (place["exec"]["command"] for place in places if "exec" in place)


def image_named(name: str, values: dict[str, Any]) -> Image | None:
    """Ours of this name; none for Valkey's."""
    for role in DOCKERFILES:
        repository = values.get("image", {}).get(role, {}).get("repository", f"rankgr/{role}")
        if name.startswith((f"{repository}:", f"{repository}@")):
            return image_of(role)
    assert name.startswith("valkey/valkey:"), name
    return None


def commands(values: dict[str, Any]) -> Iterator[Command]:
    """Everything that is run: by containers, their hooks, `ray job submit`, KubeRay."""
    documents = render(values)
    for name, _, spec in pods(documents):
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            image = image_named(container["image"], values)
            own = [*container.get("command", []), *container.get("args", [])]
            for words in [own] * bool(own) + list(hooks(container)):
                scripts = brought(documents, container, spec)
                for line in in_shell(words):
                    yield Command(f"{name} {container['name']}", tuple(line), image, scripts)
                    if line[:3] == ["ray", "job", "submit"]:  # the training cluster has the same settings
                        yield Command(f"{name} submits", tuple(line[line.index("--") + 1 :]), image_of("train"), scripts)
    for name, image, group in ray_groups(documents, values):
        options = [f"--{option}={value}" for option, value in group["rayStartParams"].items()]
        yield Command(f"{name} rayStartParams", ("ray", "start", *options), image, {})


def ray_groups(documents: list[Document], values: dict[str, Any]) -> Iterator[tuple[str, Image, dict[str, Any]]]:
    """Head and workers of Ray's resources, with their image."""
    for document in (one for one in documents if one["apiVersion"] == "ray.io/v1"):
        cluster = document["spec"].get("rayClusterConfig", document["spec"])
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            image = image_named(group["template"]["spec"]["containers"][0]["image"], values)
            assert image is not None
            yield document["metadata"]["name"], image, group


def loaded_by_ray(values: dict[str, Any]) -> Iterator[tuple[Image, str, str]]:
    """Modules and names in them that Ray Serve is told to load: its application, and what its proxies call."""
    documents = render(values)
    for document in (one for one in documents if one["kind"] == "RayService"):
        applications = yaml.safe_load(document["spec"]["serveConfigV2"])["applications"]
        paths = [one["import_path"].split(":") for one in applications]
        for _, image, group in ray_groups([document], values):
            variables = group["template"]["spec"]["containers"][0]["env"]
            called = [one["value"].rsplit(".", 1) for one in variables if one["name"].endswith("_CALLBACK_IMPORT_PATH")]
            yield from ((image, module, name) for module, name in [*paths, *called])


@pytest.mark.parametrize("values", ALL.values(), ids=ALL)
def test_every_command_is_in_its_image(values: dict[str, Any]) -> None:
    seen = list(commands(values))
    assert {"ray", "python", "sleep"} <= {command.words[0] for command in seen}
    wrong = []
    for command in seen:
        try:
            imports(command)
        except Exception as error:  # of click, which has no common one with typer's
            wrong.append(f"{command.where}: {' '.join(command.words)}: {error}")
    assert wrong == []


@pytest.mark.parametrize("role", DOCKERFILES)
def test_an_image_has_the_packages_of_all_that_runs_in_it(role: str) -> None:
    """Not what is imported further down only when something else happens, such as an embedded Redis where none is configured."""
    image, needed = image_of(role), defaultdict[str, set[str]](set)
    for name in ("CMD", "HEALTHCHECK"):
        own = Command(f"{role} {name}", tuple(instruction(role, name)), image, {})
        for statement in imports(own):
            needed[statement].add(own.where)
    for values in ALL.values():
        for command in (one for one in commands(values) if one.image is image):
            for statement in imports(command):
                needed[statement].add(command.where)
        for _, module, name in (one for one in loaded_by_ray(values) if one[0] is image):
            needed[f"from {module} import {name}"].add("Ray Serve")
    needed.pop("from __future__ import annotations", None)
    assert len(needed) > 10
    assert image.failed_import(needed) == "", dict(needed)


TRAIN, SERVE = image_of("train"), image_of("serve")
SCRIPTS = {"/etc/rankgr/run.yaml": ""}


@pytest.mark.parametrize(
    ("line", "image", "reason"),
    [
        ("rankgr stram", TRAIN, "has no stram"),
        ("rankgr stream --confg /etc/rankgr/run.yaml", TRAIN, "No such option: --confg"),
        ("rankgr stream --until-idle soon", TRAIN, "valid number"),
        ("rankgr stream --config /etc/rankgr/rnu.yaml", TRAIN, "no ConfigMap brings /etc/rankgr/rnu.yaml"),
        ("rankgr release", TRAIN, "no subcommand"),
        ("rankrg stream", TRAIN, "no program"),
        ("kfp --help", SERVE, "no program"),
        ("python -m components.sessions.jop", TRAIN, "no module"),
        ("python -m tests.chart.tools", TRAIN, "no module"),
        ("python -m pytest", TRAIN, "no module"),
        ("python -m kfp", SERVE, "no module"),
        ("python /etc/rankgr/upload.py", TRAIN, "no ConfigMap brings"),
        ("ray job submt -- rankgr run", TRAIN, "has no submt"),
        ("ray job submit --adress http://head:8265 -- rankgr run", TRAIN, "No such option"),
        ("ray start --dashbord-host=0.0.0.0", SERVE, "No such option"),
    ],
)
def test_what_is_not_there_is_found(line: str, image: Image, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        imports(Command("", tuple(line.split()), image, SCRIPTS))


def test_a_package_that_an_image_lacks_is_found() -> None:
    assert TRAIN.failed_import(["import kfp"]) == ""
    assert "kfp is not in the image" in SERVE.failed_import(["import json", "import kfp"])
    assert "pytest is not in the image" in TRAIN.failed_import(["import pytest"])


def test_the_imports_of_a_command_are_those_of_its_functions_too() -> None:
    from pipelines.cli.kubeflow import compile_pipelines
    from pipelines.cli.serve import serve

    of_serve = {"import pipelines.cli.serve", "from serving.app import start", "from serving.sync import Sync, in_step"}
    assert of_serve <= set(imports_of(serve))
    assert "from kfp import compiler" in imports_of(compile_pipelines)
