"""Documents to token ids and back: text (bpe), images (vqgan, image), both (mixed)."""
