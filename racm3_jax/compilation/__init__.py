"""Compiles the project's programs for absent machines.

machines (absent devices) -> programs (training step, decoding, embedding, search, by
shape) -> figures (bytes, communication, largest batch) -> saved (an executable in a
file)
"""
