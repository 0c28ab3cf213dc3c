"""Nearest neighbours by inner product: one contract, several back ends, one registry."""
