"""Secure aggregation: the server learns sums over clients, and no client's own update (docs/secure.md)."""
