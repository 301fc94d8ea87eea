"""Simulated users of the service: a click model, the loop that it drives, and what came of it."""
