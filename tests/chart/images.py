"""What is in the images of `infra/docker`, as their Dockerfiles say: the project's folders, packages with all that these need, programs."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.chart.generate import ROOT
from tests.command import environment

DOCKERFILES = {path.name.removesuffix(".Dockerfile"): path for path in sorted((ROOT / "infra/docker").glob("*.Dockerfile"))}
_AS_THERE = """
import re
import sys
from importlib import metadata

packages, folders = {packages!r}, {folders!r}
def is_there(top, names):
    return top in folders or any(re.sub("[-_.]+", "-", name).lower() in packages for name in names)
missing = {{top for top, names in metadata.packages_distributions().items() if not is_there(top, names)}}

class NotInTheImage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"{{name}} is not in the image", name=name)

sys.meta_path.insert(0, NotInTheImage())
"""
# In a process of its own, for Ray adds packages that it brings along to the path.


@dataclass(frozen=True)
class Image:
    """One of ours.

    Attributes:
        role: of its Dockerfile, `train` or `serve`.
        folders: of the project, at /app, where Python finds them.
        packages: canonical names of what pip leaves there.
        programs: on the PATH beside those of the system.
    """

    role: str
    folders: frozenset[str]
    packages: frozenset[str]
    programs: frozenset[str]

    def has_module(self, name: str) -> bool:
        """Whether `python -m NAME` finds it."""
        top = name.partition(".")[0]
        if top in self.folders:
            path = ROOT / name.replace(".", "/")
            return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
        distributions = metadata.packages_distributions().get(top, [])
        is_there = top in sys.stdlib_module_names or any(canonicalize_name(one) in self.packages for one in distributions)
        return is_there and find_spec(name) is not None

    def failed_import(self, statements: Iterable[str]) -> str:
        """The last line of the first import that fails with what is in the image; empty where all work."""
        script = _AS_THERE.format(packages=self.packages, folders=self.folders) + "\n".join(sorted(statements))
        command = [sys.executable, "-W", "ignore", "-c", script]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@cache
def image_of(role: str) -> Image:
    """The image of a Dockerfile."""
    text = DOCKERFILES[role].read_text("utf-8").replace("\\\n", " ")
    [extras] = re.findall(r'pip install -c constraints\.txt "?\.(?:\[(.*?)\])?"?\s', text)
    removed = {canonicalize_name(name) for names in re.findall(r"pip uninstall -y ([\w -]+?) (?=&&|-)", text) for name in names.split()}
    packages = _with_needs(_required(set(filter(None, extras.split(","))))) - removed
    copied = re.findall(r"^COPY (\w+) \1$", text, flags=re.MULTILINE)
    written = re.findall(r"> /opt/venv/bin/(\w+)", text)
    scripts = [entry.name for name in packages for entry in _entry_points(name)]
    return Image(role, frozenset(copied), frozenset(packages), frozenset(["python", *written, *scripts]))


def instruction(role: str, name: str) -> list[str]:
    """The command that the last CMD or HEALTHCHECK of a Dockerfile runs, in its form as a list."""
    text = DOCKERFILES[role].read_text("utf-8").replace("\\\n", " ")
    found = re.findall(rf"^{name} .*?(\[.*\])$", text, flags=re.MULTILINE)
    return list(ast.literal_eval(found[-1]))


def _required(extras: set[str]) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return [Requirement(one) for one in [*project["dependencies"], *(one for e in extras for one in project["optional-dependencies"][e])]]


def _with_needs(wanted: list[Requirement]) -> set[str]:
    """Canonical names of packages and of what they need; a package that is not installed here is taken without needs."""
    found: set[tuple[str, str]] = set()
    while wanted:
        one = wanted.pop()
        new = {(canonicalize_name(one.name), extra) for extra in ("", *one.extras)} - found
        found |= new
        for name, extra in new:
            needs = [Requirement(text) for text in _requires(name)]
            wanted += [need for need in needs if need.marker is None or need.marker.evaluate({**default_environment(), "extra": extra})]
    return {name for name, _ in found}


def _requires(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def _entry_points(name: str) -> Iterable[metadata.EntryPoint]:
    try:
        return metadata.distribution(name).entry_points.select(group="console_scripts")
    except metadata.PackageNotFoundError:
        return []


def imports_in(source: str) -> list[str]:
    """The import statements of a source, those inside functions too."""
    return [ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports_of(function: Callable[..., Any]) -> list[str]:
    """What a function imports when it runs, with the functions of its module that it names, and the import of that module itself."""
    module = inspect.getmodule(function)
    assert module is not None
    own = {name: one for name, one in vars(module).items() if inspect.isfunction(one) and one.__module__ == module.__name__}
    found, wanted = {f"import {module.__name__}"}, [function]
    seen: set[Callable[..., Any]] = set()
    while wanted:
        one = inspect.unwrap(wanted.pop())
        if one not in seen:
            seen.add(one)
            source = inspect.getsource(one)
            found.update(imports_in(source))
            wanted += [own[node.id] for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name) and node.id in own]
    return sorted(found)


def in_shell(words: list[str]) -> list[list[str]]:
    """The commands of a `sh -c`, or the one command that words are."""
    if words[:2] not in (["/bin/sh", "-c"], ["sh", "-c"]):
        return [words]
    return [shlex.split(part) for part in re.split(r";|&&|\|\|?", words[2])]
