"""Tokenizers: text (bpe), images (vqgan, image), documents (mixed)."""
