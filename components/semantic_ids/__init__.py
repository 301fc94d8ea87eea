"""Item features to semantic IDs."""
