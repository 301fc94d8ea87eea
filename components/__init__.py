"""The steps of the pipeline, a folder each; they meet in `infra.records` and in `components.retriever`."""
