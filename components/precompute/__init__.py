"""Bundle and timelines to slates in Redis (Ray Data)."""
