"""The project's programs, compiled for machines that are not here.

machines (devices that are described, not attached) -> programs (training step, decoding,
embedding, search, by shape) -> figures (bytes, traffic, the largest batch) -> saved (an
executable in a file)
"""
