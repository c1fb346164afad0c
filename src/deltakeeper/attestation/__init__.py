"""Signed statements about an artifact: what was measured of it, by what, bound to its hashes."""
