"""Memories of made-up documents."""

from memory_fakes import build, documents  # noqa: F401
