"""The external memory: its format on disk, its one builder, and what changes it."""
