"""The HTTP service: OpenAI's API over one engine, keys and quotas by tenant, and deltas let in by policy only."""
