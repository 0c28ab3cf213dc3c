"""Memories built with stand-ins for the models."""

from memory_fakes import build, documents  # noqa: F401
