"""Seeded malformed inputs; see `fuzz`."""
