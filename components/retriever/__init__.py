"""The generative retriever: a library without a pipeline step of its own."""
