"""Metrics, baselines, the report and the gate."""
