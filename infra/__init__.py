"""Ground floor: configuration, table schemas, storage, tracking, stores and clusters. Knows nothing of models."""
