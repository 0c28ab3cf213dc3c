"""The external memory: its format on disk, how it is built, and how it is changed."""
