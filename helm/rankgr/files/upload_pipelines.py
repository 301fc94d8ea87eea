"""Upload the pipelines that the image carries to Kubeflow; a version that is there already is left as it is."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from importlib import resources
from pathlib import Path

import kfp
import yaml
from kfp.client import ServiceAccountTokenVolumeCredentials


def with_image(text: str, image: str) -> tuple[str, str]:
    """A compiled pipeline whose steps run in an image, and the pipeline's name."""
    documents = list(yaml.safe_load_all(text))
    for executor in documents[0]["deploymentSpec"]["executors"].values():
        if "container" in executor:
            executor["container"]["image"] = image
    return yaml.safe_dump_all(documents, sort_keys=False), documents[0]["pipelineInfo"]["name"]


def upload(client: kfp.Client, text: str, name: str, namespace: str | None) -> str:
    """Upload a pipeline, or a further version of it, named after its content; returns what was done."""
    version = hashlib.sha256(text.encode()).hexdigest()[:12]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.yaml"
        file.write_text(text, "utf-8")
        same_name = json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})
        found = client.list_pipelines(filter=same_name, namespace=namespace).pipelines
        pipeline = found[0] if found else client.upload_pipeline(str(file), pipeline_name=name, namespace=namespace)
        there = client.list_pipeline_versions(pipeline.pipeline_id, page_size=100, sort_by="created_at desc").pipeline_versions or []
        if any(one.display_name == version for one in there):
            return f"{name}: version {version} is there"
        client.upload_pipeline_version(str(file), pipeline_version_name=version, pipeline_id=pipeline.pipeline_id)
        return f"{name}: version {version} is uploaded"


def main() -> None:
    """Upload all of them to KFP_HOST with the token of KFP_TOKEN."""
    namespace = os.environ.get("KFP_NAMESPACE") or None
    credentials = ServiceAccountTokenVolumeCredentials(path=os.environ["KFP_TOKEN"])
    client = kfp.Client(host=os.environ["KFP_HOST"], credentials=credentials, namespace=namespace or "kubeflow")
    for file in sorted(resources.files("pipelines").joinpath("compiled").iterdir(), key=lambda one: one.name):
        if file.name.endswith(".yaml"):
            text, name = with_image(file.read_text("utf-8"), os.environ["RANKGR_IMAGE"])
            sys.stdout.write(upload(client, text, name, namespace) + "\n")


if __name__ == "__main__":
    main()
