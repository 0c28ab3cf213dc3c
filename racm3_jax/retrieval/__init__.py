"""Which documents to read: CLIP, the embedder, the index, the memory, the strategy."""
