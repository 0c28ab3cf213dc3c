"""What follows from the committed results, written after they were measured."""

from __future__ import annotations

CONCLUSIONS: dict[str, str] = {}
