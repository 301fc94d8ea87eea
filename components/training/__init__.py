"""Timelines and semantic IDs to weights (Ray Train)."""
