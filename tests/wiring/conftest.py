"""Memories of synthetic documents."""

from memory_fakes import build, documents  # noqa: F401
