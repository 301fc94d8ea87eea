"""The reward model: what a user would do with a session of items."""
