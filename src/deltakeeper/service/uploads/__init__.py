"""Artifacts pushed to a running service: read as they come, checked whole, put among the deltas in one step."""
