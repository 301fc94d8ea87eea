"""Kubeflow pipelines and the `rankgr` command."""
