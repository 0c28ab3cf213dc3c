"""The generator: a decoder-only Transformer over token ids, and its decoding cache."""
