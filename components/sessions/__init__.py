"""Raw logs to per-user timelines, sharded (Ray Data)."""
