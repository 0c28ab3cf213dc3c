"""The generator: a decoder-only Transformer over tokens, and its KV cache."""
